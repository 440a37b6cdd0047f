"""What C takes from headers: loads, stores, fences, system calls and struct views for compiled Python."""
