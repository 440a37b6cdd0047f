"""What C gets from its headers, for compiled Python: loads, stores, fences, system calls and struct views."""
