"""How many tokens a block id stands for, where a trace does not say: what the numbers of ids leave possible.

A prompt of p tokens in blocks of b has ceil(p / b) ids where its partial tail has one (Mooncake), floor(p / b) where it
has none (vLLM). Sizes are those that engines use; a size that only happens to fit beside others is not taken.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from traces.schema import Ints, TraceError

USUAL_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512)
LARGE_TOKENS = (1024, 2048, 4096, 8192)  # only where none of the usual ones fits

_Fit = Callable[[Ints, Ints, int], NDArray[np.bool_]]


def with_tail(prompt: Ints, counts: Ints, size: int) -> NDArray[np.bool_]:
    """Which prompts have one id for each block, the partial last one included."""
    return np.asarray(counts == -(-prompt // size))


def without_tail(prompt: Ints, counts: Ints, size: int) -> NDArray[np.bool_]:
    """Which prompts have one id for each full block."""
    return np.asarray(counts == prompt // size)


def either(prompt: Ints, counts: Ints, size: int) -> NDArray[np.bool_]:
    """Which prompts have one id for each full block, the partial tail with one or without."""
    return np.asarray((counts >= prompt // size) & (counts <= -(-prompt // size)))


def block_tokens_of(prompt: Ints, counts: Ints, *, source: str, default: int = 0, certain: bool = False) -> int:
    """The tokens of a block, from prompts in tokens and their numbers of ids.

    `default` is the size of the format, which gives a partial tail an id: it stands where nobody has an id, where it is
    the one that fits so, and where no size fits all rows, so that the first misfit can be named; `certain`, where other
    columns tell the format, also wherever it fits at all. Raises TraceError where several sizes fit or none does.
    """
    if default and (not counts.any() or (certain and either(prompt, counts, default).all())):
        return default
    candidates = _fitting(with_tail, prompt, counts)
    if candidates != [default]:
        candidates = sorted({*candidates, *_fitting(without_tail, prompt, counts)})
    if default and not candidates and _fitting(either, prompt, counts) == [default]:
        return default
    if len(candidates) == 1 and (candidates == [default] or _certainly(candidates[0], prompt, counts)):
        return candidates[0]
    if candidates:
        sizes = ", ".join(map(str, candidates))
        raise TraceError(
            f"{source}: hash_ids without block_tokens; add that column, or the option block_tokens={candidates[-1]}: "
            f"the numbers of ids fit blocks of {sizes} tokens{' alike' if len(candidates) > 1 else ', and of others'}"
        )
    return _of_most(prompt, counts, source, default)


def _fitting(fit: _Fit, prompt: Ints, counts: Ints) -> list[int]:
    for sizes in (USUAL_TOKENS, LARGE_TOKENS):
        found = [size for size in sizes if fit(prompt, counts, size).all()]
        if found:
            return found
    return []


def _certainly(size: int, prompt: Ints, counts: Ints) -> bool:
    """Whether a size that fits only without ids for partial tails leaves no size, usual or not, that fits with them.

    ceil(p / b) ids means p / count <= b < p / (count - 1).
    """
    if (counts == 0).any() or with_tail(prompt, counts, size).all():
        return True
    several = counts > 1
    most = (-(-prompt[several] // (counts[several] - 1)) - 1).min() if several.any() else np.iinfo(np.int64).max
    return bool((-(-prompt // counts)).max() > most)


def _of_most(prompt: Ints, counts: Ints, source: str, default: int) -> int:
    """Where no size fits all rows: the one that fits most of those that tell sizes apart, so that others can be named.

    Those are prompts of several blocks.
    """
    several = counts > 1
    fits = {size: int(with_tail(prompt, counts, size)[several].sum()) for size in (*USUAL_TOKENS, *LARGE_TOKENS)}
    best = max(fits, key=lambda size: fits[size])
    if fits[best] > several.sum() / 2 and not either(prompt, counts, best).all():
        return best
    if default and not either(prompt, counts, default).all():
        return default
    raise TraceError(
        f"{source}: hash_ids without block_tokens; add that column, or the option block_tokens=16: "
        "the numbers of ids fit no usual size of a block"
    )
