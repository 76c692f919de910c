"""Whether more sequences decode at a time than the link that all of them load can serve.

Where decoding waits for copies or for the CPU, and each sequence adds its own, a smaller batch takes less time and
gives nearly as many tokens. Be w the share of decoding that waits for such a lane and r = 1 - w what it does otherwise.
With a part x of the sequences a step takes no more than w x + r of its time, for the lane's work is in proportion to
the sequences and the rest is at most what it was. So at least x / (w x + r) of the tokens are given. The x at which
that is 90 % is 0.9 r / (0.1 w + r), and where it is a half or less, it is said.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvsim.results.causes import spent_s

_LANES = {"pcie": "copies over PCIe", "cpu": "the CPU"}
_KEPT, _MOST = 0.9, 0.5
_FEWEST = 2.0  # sequences, below which there is nothing to divide


def crowding(requests: Mapping[str, NDArray[Any]]) -> str:
    """The warning, with a number for --max-num-seqs; empty where a smaller batch would give much less."""
    took_s = requests["finish_s"] - requests["first_token_s"]
    decoding = np.flatnonzero(took_s > 0)  # never where one has not finished
    if not len(decoding):
        return ""
    whole_s = float(took_s[decoding].sum())
    spent = {name: float(seconds[decoding].sum()) for name, seconds in spent_s(requests, "decode").items()}
    lane = max(_LANES, key=lambda name: spent[name])
    waits = spent[lane] / whole_s
    rest = max(0.0, 1 - waits)
    part = _KEPT * rest / ((1 - _KEPT) * waits + rest)
    replicas = requests["replica"][decoding]
    begins, ends = (requests[name][decoding] for name in ("first_token_s", "finish_s"))
    time_s = sum(_covered_s(begins[own], ends[own]) for own in (replicas == r for r in np.unique(replicas)))
    sequences = whole_s / time_s
    fewer = max(1, math.ceil(part * sequences))
    if sequences < _FEWEST or fewer > _MOST * sequences:
        return ""
    x = fewer / sequences
    time = waits * x + rest
    return (
        f"more sequences than {_LANES[lane]} can serve: decoding waits for that in {waits:.1%} of its time, and a "
        f"replica decodes {sequences:.3g} sequences at a time in the mean, which add latency and hardly any tokens; "
        f"--max-num-seqs {fewer} would give at least {x / time:.0%} of the tokens/s, a token in at most {time:.0%} of "
        "the time"
    )


def _covered_s(begin_s: NDArray[Any], end_s: NDArray[Any]) -> float:
    """Seconds that lie in any of the intervals."""
    order = np.argsort(begin_s, kind="stable")
    begins, reached = begin_s[order], np.maximum.accumulate(end_s[order])
    return float(reached[-1] - begins[0] - np.maximum(begins[1:] - reached[:-1], 0).sum())
