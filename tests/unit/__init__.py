"""Tests of single parts of ringplane, some against models of the specification."""

from hypothesis import settings

# The first example of a test loads or compiles the data plane, however long that takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
