"""Tests of ringplane as its users install and start it: as a process, under all kinds of restrictions."""
