"""The memory that front ends share: its regions and their addresses, and a quota of address space per disk."""
