"""Settings for all tests."""

from hypothesis import settings

# The same examples in every run, and no time limit that a busy machine would break.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("repeatable")
