"""Prompts of different lengths in one forward pass: padded, packed into rows, without padding, or in chunks.

What they amount to is a sum over prompts of the dense cache's plan, so only the tokens that run through the projections
and the MLP, and for padding the lengths themselves, differ between these.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvsim.iteration.clock import Clock, Load
from kvsim.plans.derive import AMOUNTS, TIERS, PlanTable


class Forward(NamedTuple):
    """One pass: parts of prompts as (prompt, past, new) tokens, the tokens that run, and the prompts that it ends."""

    parts: Sequence[tuple[int, int, int]]
    tokens: int
    ends: int


class Batching(NamedTuple):
    """What a way to batch costs for some prompts, one rank."""

    scheme: str
    forwards: int
    tokens: int  # that run, padding included
    padding_share: float
    flops: int
    attention_flops: int
    seconds: float


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of at most `capacity` tokens: from the longest on, each prompt goes to the first that has room.

    At most 11/9 of the fewest bins possible, and two thirds of one more (Dosa 2007). Raises ValueError for a prompt
    longer than a bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        if not 0 < length <= capacity:
            raise ValueError(f"a prompt of {length} tokens does not fit a bin of {capacity}")
        place = next((i for i, free in enumerate(room) if free >= length), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(length)
        room[place] -= length
    return bins


def _padded(lengths: Sequence[int]) -> Forward:
    """Every prompt as long as the longest, in rows of a rectangle; a causal kernel computes those of padding too."""
    longest, n = max(lengths), len(lengths)
    return Forward([(longest, 0, longest)] * n, n * longest, n)


def _packed(lengths: Sequence[int]) -> Forward:
    """Prepacking (arXiv:2404.09529): prompts behind one another in rows as long as the longest prompt.

    Each attends to itself alone. Rows are padded to the fullest one.
    """
    bins = first_fit_decreasing(lengths, max(lengths))
    width = max(map(sum, bins))
    return Forward([(n, 0, n) for n in lengths], len(bins) * width, len(lengths))


def _unpadded(lengths: Sequence[int]) -> Forward:
    """ByteTransformer (arXiv:2210.03052) and kernels of variable length: nothing but the prompts' own tokens."""
    return Forward([(n, 0, n) for n in lengths], sum(lengths), len(lengths))


def batches(lengths: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The prompts in order, `size` at a time."""
    for first in range(0, len(lengths), size):
        yield lengths[first : first + size]


def chunks(lengths: Sequence[int], chunk_tokens: int) -> Iterator[Forward]:
    """Passes of exactly `chunk_tokens`, but for the last: prompts are cut where one is full (arXiv:2308.16369)."""
    parts: list[tuple[int, int, int]] = []
    left, ends = chunk_tokens, 0
    for prompt in lengths:
        past = 0
        while past < prompt:
            new = min(left, prompt - past)
            parts.append((prompt, past, new))
            past, left, ends = past + new, left - new, ends + (past + new == prompt)
            if not left:
                yield Forward(parts, chunk_tokens, ends)
                parts, left, ends = [], chunk_tokens, 0
    if parts:
        yield Forward(parts, chunk_tokens - left, ends)


def compare(lengths: Sequence[int], batch: int, chunk_tokens: int, table: PlanTable, clock: Clock) -> list[Batching]:
    """Each way to prefill prompts of these lengths, `batch` at a time in their order, or in chunks.

    Raises ValueError for no prompts, and for a batch or chunk below one.
    """
    if not lengths or min(lengths) < 1 or batch < 1 or chunk_tokens < 1:
        raise ValueError(
            f"{len(lengths)} prompts in batches of {batch} and chunks of {chunk_tokens} tokens: each must be at least 1"
        )
    schemes: dict[str, tuple[Callable[[Sequence[int]], Forward], Sequence[int]]] = {
        "padded": (_padded, lengths),
        "padded, sorted": (_padded, sorted(lengths)),
        "packed": (_packed, lengths),
        "unpadded": (_unpadded, lengths),
    }
    plans = {name: [run(part) for part in batches(order, batch)] for name, (run, order) in schemes.items()}
    plans["chunked"] = list(chunks(lengths, chunk_tokens))
    return [_priced(name, plan, sum(lengths), table, clock) for name, plan in plans.items()]


def _priced(name: str, forwards: Sequence[Forward], prompt_tokens: int, table: PlanTable, clock: Clock) -> Batching:
    model = table.model
    flops = attention = tokens = 0
    seconds = 0.0
    for forward in forwards:
        loads: dict[int, Load] = {}
        for part in forward.parts:
            structure, amounts = table.prefill(*part)
            found = loads.get(id(structure))
            loads[id(structure)] = Load(structure, amounts if found is None else found.amounts + amounts)
        for structure, amounts in loads.values():
            work = amounts[: -len(TIERS)][::AMOUNTS]
            attention += int(work @ np.array(structure.multiplicity()))
        tokens += forward.tokens
        linear = 2 * (model.active_params - model.head_params) * forward.tokens
        flops += linear + 2 * model.head_params * forward.ends
        seconds += clock.iteration([*loads.values()], forward.tokens, forward.ends)[0]
    return Batching(
        scheme=name,
        forwards=len(forwards),
        tokens=tokens,
        padding_share=1 - prompt_tokens / tokens,
        flops=flops + attention,
        attention_flops=attention,
        seconds=seconds,
    )
