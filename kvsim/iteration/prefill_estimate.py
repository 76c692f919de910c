"""How long a prompt takes to prefill by itself, told before anything runs.

`engine/batch/estimate.py` tells it meanwhile.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

from kvsim.iteration.makespan import Clock, Load
from kvsim.plans.derive import PlanTable

PrefillEstimate: TypeAlias = Callable[[int, int], float]
"""Seconds that a prompt's prefill takes by itself, from its tokens and those of them that are cached."""


def prefill_estimate(table: PlanTable, clock: Clock, chunk_tokens: int) -> PrefillEstimate:
    """Times of prefills alone: exact in one chunk, and the first and the last whole one averaged for several.

    (A chunk's time grows about evenly with what comes before it.)
    """

    def chunk_s(prompt_tokens: int, past_tokens: int, new_tokens: int) -> float:
        last = past_tokens + new_tokens == prompt_tokens
        load = Load(*table.prefill(prompt_tokens, past_tokens, new_tokens))
        return clock.iteration([load], new_tokens, int(last))[0]

    @lru_cache(maxsize=1 << 16)
    def prefill_s(prompt_tokens: int, cached_tokens: int) -> float:
        whole, rest = divmod(prompt_tokens - cached_tokens, chunk_tokens)
        seconds = chunk_s(prompt_tokens, prompt_tokens - rest, rest) if rest else 0.0
        if whole:
            ends = cached_tokens, cached_tokens + (whole - 1) * chunk_tokens
            seconds += whole * sum(chunk_s(prompt_tokens, past, chunk_tokens) for past in ends) / 2
        return seconds

    return prefill_s
