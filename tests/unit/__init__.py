"""Tests of single parts of ringplane, with models of the specification to compare them with."""

from hypothesis import settings

# The first example of a test loads or compiles the data plane; how long that takes is nobody's mistake.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
