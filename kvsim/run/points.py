"""The points of a sweep: each simulated once, whatever interrupts, and a row for every one of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from kvsim.results.identity import digest
from kvsim.results.row import Value, figures
from kvsim.results.summary import Result, summarize
from kvsim.run.executor import Executor
from kvsim.run.jobs import Job
from kvsim.run.journal import Journal
from kvsim.run.sweep import Failure, sweep
from kvsim.scenario.scenario_file import Scenario
from kvsim.version import __version__
from traces import Trace

DONE, IMPOSSIBLE, KILLED = "done", "impossible", "killed"
_TRACES = 4  # kept at a time


def simulate_points(
    asked: Sequence[Scenario], journal: Journal, show: Callable[[int], None], executor: Executor | None = None
) -> list[dict[str, Value]]:
    """A row for each point: `status`, the `reason` where there are no figures, and the figures of `kvsim.results.row`.

    What the journal has of a point with the same trace, setup and bounds is not simulated again; what can be found only
    by simulating is put there as it comes. `show` is told how many points are settled. The journal is left with these
    points alone. Raises as `Executor` and `Journal` do.
    """
    keys: list[str] = []  # of all points, by what their figures depend on
    running: list[str] = []  # of those that are simulated
    failures: dict[str, tuple[str, str]] = {}
    traces, settled = _Traces(), 0

    def jobs() -> Iterator[Job]:
        known = set(journal.found)
        for number, one in enumerate(asked):
            try:
                (setup,) = one.setups()
                trace, of_trace = traces.load(one)
            except ValueError as error:
                keys.append(f"point {number}")
                failures[keys[-1]] = IMPOSSIBLE, str(error)
            else:
                keys.append(digest([__version__, of_trace, setup, one.slo_s, one.warmup]))
                if keys[-1] not in known:
                    known.add(keys[-1])
                    running.append(keys[-1])
                    yield Job(trace, setup)
            show(len(keys) - len(running) + settled)

    keep = partial(_figures, slo=asked[0].slo_s, warmup_s=asked[0].warmup)
    for index, found in sweep(jobs(), keep, executor):
        settled += 1
        if not isinstance(found, Failure):
            journal.add(running[index], found)
        elif found.was_killed:
            failures[running[index]] = KILLED, found.reason
        else:
            journal.add(running[index], {"reason": found.reason})
        show(len(keys) - len(running) + settled)
    journal.settle(key for key in keys if key in journal.found)
    return [_row(failures.get(key), journal.found.get(key, {})) for key in keys]


def _row(failure: tuple[str, str] | None, found: Mapping[str, Value]) -> dict[str, Value]:
    if failure is None and "reason" in found:
        failure = IMPOSSIBLE, str(found["reason"])
    if failure is not None:
        return {"status": failure[0], "reason": failure[1]}
    return {"status": DONE, "reason": None, **found}


def _figures(result: Result, slo: Mapping[str, float], warmup_s: float) -> dict[str, Value]:
    return figures(summarize(result, slo, warmup_s))


class _Traces:
    """The last few traces that points replay, each with its digest: many points replay the same one."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], tuple[Trace, str]] = {}

    def load(self, asked: Scenario) -> tuple[Trace, str]:
        key = (asked.trace, asked.limit, asked.seed, asked.skip_bad_rows, asked.rate_scale)
        if key not in self._kept:
            trace = asked.load_trace()
            while len(self._kept) >= _TRACES:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = trace, digest(trace)
        return self._kept[key]
