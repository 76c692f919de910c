"""Which request of a session each one waited for: what a replay in closed loop goes by."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from traces.schema import Floats, Ints, Trace

NOBODY = -1
_ROUNDING_S = 1e-6  # of recorded times


@dataclass(frozen=True, slots=True, eq=False)
class Followers:
    """For each request its `leader` (-1: none), and the delay after that one's end or else its arrival."""

    leader: Ints
    delay_s: Floats
    after_end: np.ndarray[tuple[int], np.dtype[np.bool_]]


def followers(trace: Trace) -> Followers:
    """Who waits for whom, inferred from arrivals and think times.

    A client thought from `arrival_s - think_s` on, so it had waited for the request of its session that was the last to
    arrive by then: usually the one before, but an agent also waits for its sub-agents, and these run beside each other.
    Where the think time is unknown, or longer than the session is old, the request keeps its distance to the arrival of
    the one before.
    """
    n = len(trace)
    leader, delay_s, after_end = np.full(n, NOBODY), np.zeros(n), np.zeros(n, np.bool_)
    arrivals: defaultdict[int, list[float]] = defaultdict(list)
    members: defaultdict[int, list[int]] = defaultdict(list)
    columns = zip(trace.session.tolist(), trace.arrival_s.tolist(), trace.think_s.tolist(), strict=True)
    for index, (session, arrival_s, think_s) in enumerate(columns):
        if session < 0:
            continue
        before_s, before = arrivals[session], members[session]
        if before:
            place = 0 if np.isnan(think_s) else bisect_right(before_s, arrival_s - think_s + _ROUNDING_S)
            after_end[index] = place > 0
            leader[index] = before[place - 1]
            delay_s[index] = think_s if place else arrival_s - before_s[-1]
        before_s.append(arrival_s)
        before.append(index)
    return Followers(leader, delay_s, after_end)
