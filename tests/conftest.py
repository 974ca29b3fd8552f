"""Settings of all tests: the same examples on every run, so that a failure can be run again."""

from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")
