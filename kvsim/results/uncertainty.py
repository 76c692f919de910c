"""How far a run's figures could be off: over traces drawn with other seeds, or over blocks of a recorded trace."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvsim.results.intervals import CONFIDENCE, Floats, Interval, Ints, block_length, bootstrap, t_interval

RATES = ("output_tokens_per_s", "goodput_rps")
STATISTICS = ("mean", "p50", "p99")
SAMPLES = 1000
FEWEST_REQUESTS = 30  # below which resampling says little

SEEDS = "Student's t interval over runs on traces drawn with different seeds, cut off at 0"
BLOCKS = "percentile interval of a circular block bootstrap over a recorded trace's requests in order of arrival"
TOO_FEW = f"none: the seed changes nothing in this trace, and fewer than {FEWEST_REQUESTS} requests finished"


def over_seeds(summaries: Sequence[Mapping[str, Any]], latencies: Sequence[str]) -> dict[str, Any]:
    """Mean and interval of each figure over the summaries of independent runs, at least two."""
    seeds = [summary["inputs"]["seed"] for summary in summaries]

    def interval(values: Sequence[float | None]) -> dict[str, float | None]:
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return _shown(None)
        found = t_interval(known)
        return _shown(found._replace(low=max(0.0, found.low)))  # neither a rate nor a latency can be below 0

    return {
        "method": SEEDS,
        "confidence": CONFIDENCE,
        "seeds": seeds,
        **{name: interval([summary[name] for summary in summaries]) for name in RATES},
        **{
            name: {rank: interval([summary[name][rank] for summary in summaries]) for rank in STATISTICS}
            for name in latencies
        },
    }


def over_blocks(
    arrival_s: Floats,
    makespan_s: float,
    output_tokens: Ints,
    good: NDArray[np.bool_],
    latencies: Mapping[str, Floats],
    decoding: tuple[Floats, Ints],
    seed: int,
) -> dict[str, Any]:
    """The figures of a single run, and the spread that resampling its requests gives.

    Each request carries the gap to the next arrival, its output tokens (0 where it did not finish), whether it is
    within the SLO, its latencies (NaN where it has none to count), and for `decoding` the seconds from its first token
    to its last and the tokens after the first (0 where it did not finish): the mean inter-token latency, but not
    its percentiles. Blocks are as long as the dependence of `e2e_s` asks for. What is known is this trace: rates and
    lengths that it never had are not in it.
    """
    e2e_s = latencies["e2e_s"]
    known = ~np.isnan(e2e_s)
    if known.sum() < FEWEST_REQUESTS:
        return {"method": TOO_FEW, "confidence": CONFIDENCE}
    n = len(arrival_s)
    length = block_length(e2e_s[known])
    gaps_s = np.diff(arrival_s, append=arrival_s[0] + makespan_s)  # what is left after the last arrival is its own
    samples = [_Sample(values) for values in latencies.values()]

    def figures(times: Ints) -> list[float]:
        span_s = float(times @ gaps_s)
        rates = [float(times @ amounts) / span_s if span_s > 0 else math.nan for amounts in (output_tokens, good)]
        seconds, tokens = (float(times @ amounts) for amounts in decoding)
        return [
            *rates,
            seconds / tokens if tokens else math.nan,
            *(figure for sample in samples for figure in sample.figures(times)),
        ]

    once = figures(np.ones(n, np.int64))
    spread = bootstrap(n, length, SAMPLES, seed, figures)
    shown = [_shown(Interval(value, *ends)) for value, ends in zip(once, spread, strict=True)]
    itl_s, first = shown[len(RATES)], len(RATES) + 1
    ranks = [shown[first + i : first + i + 3] for i in range(0, 3 * len(samples), 3)]
    return {
        "method": BLOCKS,
        "confidence": CONFIDENCE,
        "block_requests": length,
        "samples": SAMPLES,
        **dict(zip(RATES, shown[: len(RATES)], strict=True)),
        **{name: dict(zip(STATISTICS, own, strict=True)) for name, own in zip(latencies, ranks, strict=True)},
        "itl_s": {"mean": itl_s, **dict.fromkeys(STATISTICS[1:], _shown(None))},
    }


class _Sample:
    """Latencies in ascending order, so that their statistics under any weights need no sorting."""

    def __init__(self, values: Floats) -> None:
        order = np.argsort(values)
        self.rows = order[: len(values) - int(np.isnan(values).sum())]
        self.values = values[self.rows]

    def figures(self, times: Ints) -> list[float]:
        """STATISTICS where each value counts so often; nearest ranks, as everywhere."""
        weights = times[self.rows]
        ranks = np.cumsum(weights)
        if not len(ranks) or not ranks[-1]:
            return [math.nan] * len(STATISTICS)
        total = int(ranks[-1])
        at = np.searchsorted(ranks, [-(-total * percent // 100) for percent in (50, 99)])
        return [float(weights @ self.values) / total, *self.values[at].tolist()]


def _shown(interval: Interval | None) -> dict[str, float | None]:
    if interval is None or not all(map(math.isfinite, interval)):
        return dict.fromkeys(Interval._fields)
    return interval._asdict()
