"""Results of several seeds, gathered into one for each policy."""

from collections.abc import Sequence
from dataclasses import replace

from kvsim.results.summary import Result
from kvsim.scenario.scenario_file import Scenario


def gather(asked: Scenario, results: Sequence[Result], policies: int, *, whole: bool) -> list[Result]:
    """For each policy its result on the first trace, which carries those on further ones if all are `whole`.

    `results` are those of all policies on the first trace, then on the second, and so on.
    """
    known = [
        replace(result, inputs={**result.inputs, **asked.resolved(), "seed": asked.seed + index // policies})
        for index, result in enumerate(results)
    ]
    if asked.seeds == 1 or not whole:
        return known[:policies]
    repeats = [replace(result, series={}) for result in known[policies:]]  # nothing reads a repeat's series
    return [replace(known[i], repeats=tuple(repeats[i::policies])) for i in range(policies)]
