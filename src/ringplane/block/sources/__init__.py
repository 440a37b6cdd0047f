"""Sources: where the bytes of a disk come from. Each module has all that is special about one."""
