"""Layers: what happens to I/Os between the rings and the source. Each module has all that is special about one."""
