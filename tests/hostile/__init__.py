"""Attacks by malicious drivers and front ends on a ringplane process; docs/hostile-drivers.md lists the classes."""
