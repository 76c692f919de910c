"""The command line, one file per command group.

Exit codes: 0 done, 2 bad input, 3 a target cannot be met, 130 interrupted.
"""


class TargetUnmet(Exception):
    """What was asked for is well formed, but an SLO or another target cannot be met; the program exits with 3."""
