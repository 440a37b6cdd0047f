"""Tests of single parts of ringplane, some against models of the specification."""

from hypothesis import HealthCheck, settings

# Examples of a test share its fixtures. Nothing is timed: the first example loads or compiles the data plane, and other
# tests use the CPUs at the same time.
settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("untimed")
