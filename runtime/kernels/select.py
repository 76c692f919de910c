"""Selection on the device: the best ids of each row, and which slots of a cache they take.

Nothing here waits for the GPU: counts stay tensors, lists are padded with -1, so shapes never depend on data.
"""

import torch
from torch import Tensor

NONE = -1  # the id of no row


def top_ids(scores: Tensor, k: int, names: Tensor | None = None) -> Tensor:
    """The k highest of each row, as int64 ids in ascending order: `(..., n)` -> `(..., k)`.

    Ties go to the lowest index, so that a run can be repeated. A score of -inf is never chosen; where fewer than k
    are left, the row ends in -1. Scores must not be NaN. With `names`, int64 (batch, kv_heads, n) as the scores are,
    ids are those that stand there. Raises ValueError unless 0 <= k <= n.
    """
    n = scores.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"k={k} must lie between 0 and the {n} scores of a row")
    if k == 0:
        return torch.empty((*scores.shape[:-1], 0), dtype=torch.int64, device=scores.device)
    if scores.is_cuda:
        from runtime.kernels.select_triton import select_top, takes

        if takes(n, k):
            return select_top(scores.float().contiguous(), k, names).view(*scores.shape[:-1], k)
    # The k-th value is well defined even if torch.topk's choice among equals is not.
    least = torch.topk(scores, k, dim=-1).values[..., -1:]
    above, equal = scores > least, scores == least
    spare = k - above.sum(dim=-1, keepdim=True)
    chosen = (above | (equal & (equal.cumsum(dim=-1) <= spare))) & (scores > -torch.inf)
    ids = torch.arange(n, device=scores.device).expand(scores.shape) if names is None else names
    return _compact(ids, chosen, k)


def chosen_first(scores: Tensor, ids: Tensor) -> Tensor:
    """Scores `(..., n)` of which those of `ids`, broadcastable to `(..., m)`, are infinite: `top_ids` takes them first.

    Ids that name no score (-1, or n and above) change nothing.
    """
    n = scores.shape[-1]
    there = torch.where((ids < 0) | (ids >= n), n, ids).expand(*scores.shape[:-1], -1)
    return torch.nn.functional.pad(scores, (0, 1)).scatter(-1, there, torch.inf)[..., :n]


def true_ids(chosen: Tensor) -> Tensor:
    """Where each row is True, as int64 ids in ascending order, padded with -1: bool `(..., n)` -> `(..., n)`."""
    n = chosen.shape[-1]
    return _compact(torch.arange(n, device=chosen.device).expand(chosen.shape), chosen, n)


def replace_ascending(resident_ids: Tensor, new_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the slots hold `new_ids`: `(fetch_ids, slots, n_missed)`, and `resident_ids` is updated.

    resident_ids `(batch, kv_heads, slots)`, int64, says which id each slot holds, -1 = empty; new_ids `(batch,
    kv_heads, n)`, int64, are wanted, each once and in ascending order, -1 at the end = none (in another order a GPU
    finds other hits than there are). A hit keeps its slot. Missed ids, in the order of
    `new_ids`, take the freed slots, lowest first: `fetch_ids` and `slots`, `(batch, kv_heads, n)`, list them and are
    padded with -1; `n_missed` is `(batch, kv_heads)`. Slots freed but not taken become empty.
    Raises ValueError unless n lies between 1 and the slots.
    """
    n, slots = new_ids.shape[-1], resident_ids.shape[-1]
    if new_ids.dim() != 3 or new_ids.shape[:2] != resident_ids.shape[:2] or not 1 <= n <= slots:
        raise ValueError(
            f"new_ids {tuple(new_ids.shape)} must be (batch, kv_heads, n) with n from 1 to at most the slots of "
            f"resident_ids {tuple(resident_ids.shape)}"
        )
    if resident_ids.is_cuda:
        from runtime.kernels.select_triton import MAX_SLOTS, replace

        if slots <= MAX_SLOTS:
            return replace(resident_ids, new_ids.contiguous())
    missed = (new_ids >= 0) & ~_is_in(new_ids, resident_ids)
    freed = (resident_ids < 0) | ~_is_in(resident_ids, new_ids)
    fetch_ids = _compact(new_ids, missed, n)
    free_slots = _compact(torch.arange(slots, device=new_ids.device).expand(resident_ids.shape), freed, slots)
    taken = torch.where(fetch_ids >= 0, free_slots[..., :n], NONE)
    # The r-th freed slot gets the r-th missed id, or the padding behind the last.
    padded = torch.nn.functional.pad(fetch_ids, (0, 1), value=NONE)
    rank = (freed.cumsum(dim=-1) - 1).clamp(0, n)
    resident_ids.copy_(torch.where(freed, padded.gather(-1, rank), resident_ids))
    return fetch_ids, taken, missed.sum(dim=-1)


def token_ids(chunk_ids: Tensor, chunk_tokens: int) -> Tensor:
    """Ids of all tokens of the chunks, in order, -1 for those of chunk -1: `(..., n)` -> `(..., n * chunk_tokens)`."""
    within = torch.arange(chunk_tokens, device=chunk_ids.device)
    tokens = chunk_ids[..., None] * chunk_tokens + within
    return torch.where(chunk_ids[..., None] < 0, NONE, tokens).flatten(-2)


def _compact(values: Tensor, keep: Tensor, size: int) -> Tensor:
    """The kept values of each row in their order, padded with -1 to `size`."""
    position = torch.where(keep, keep.cumsum(dim=-1) - 1, size)  # what is dropped lands in one column too many
    out = torch.full((*values.shape[:-1], size + 1), NONE, dtype=torch.int64, device=values.device)
    return out.scatter_(-1, position, values)[..., :size]


def _is_in(values: Tensor, of: Tensor) -> Tensor:
    """Whether each value is among the same row's `of`."""
    ordered = of.sort(dim=-1).values
    place = torch.searchsorted(ordered, values.contiguous()).clamp(max=of.shape[-1] - 1)
    return ordered.gather(-1, place) == values
