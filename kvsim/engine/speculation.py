"""Decode steps that emit several tokens: how far they bring a sequence, and what guessing adds to an iteration.

A sequence follows the mean: each step brings it `tokens_per_step` tokens further, a number that need not be whole.
Where it stands between two tokens its amounts do too, to the nearest unit; so they grow evenly, as those of single
tokens do, and runs of steps keep their closed form.
"""

import math

from kvsim.engine.state.cluster import SLOPE, VECTOR, Floats, Ints, Record
from kvsim.iteration.busy import add_guesses


def steps_over(world: Record, tokens: float) -> int:
    """The steps after which at least so many tokens have been emitted."""
    return int(math.ceil(tokens / world["tokens_per_step"]))  # noqa: RUF046 - what is divided by is of no known type


def pace(world: Record, rows: Ints, columns: int, fraction: float) -> None:
    """Turn VECTOR and SLOPE, by token, into amounts `fraction` of a token later and their growth by step."""
    per_step = world["tokens_per_step"]
    if per_step == 1:
        return
    for i in range(columns):
        rate = rows[SLOPE, i]
        rows[VECTOR, i] += math.floor(fraction * rate + 0.5)
        rows[SLOPE, i] = math.floor(per_step * rate + 0.5)


def guess(world: Record, busy: Floats, sequences: int, prompt_tokens: int) -> float:
    """Seconds that guessing adds to an iteration, after all else; adds to what `busy` has."""
    if world["step_tokens"] > 1:
        return add_guesses(world["guess_parts_s"], busy, sequences, prompt_tokens)
    return 0.0


def charge_guesses(world: Record, replica: Record, iterations: int, sequences: int, prompt_tokens: int) -> None:
    """Book the weights that guessing reads in so many iterations, and the bytes of its collectives."""
    for i in range(2):
        n = prompt_tokens if i else sequences
        if n:
            replica["weight_bytes"] += iterations * world["guess_weight_bytes"][i]
            replica["collective_bytes"] += iterations * n * world["guess_sent_bytes"][i]
