"""What is counted in compiled code, and read by Python."""
