"""Settings for all tests."""

import signal

from hypothesis import settings

# A shell that starts the tests in the background, or nohup, has them ignore what some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)

# The same examples in every run, and no time limit that a busy machine would break.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("repeatable")
