"""What users write for options, and how it is read and checked."""
