"""Layers: what happens to I/Os between the rings and the source. Each module has all that is special about one.

`layer` says what a layer is for the control plane, `registry` lists them. Their options are in the folder `options`.
"""
