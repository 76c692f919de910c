"""Triton kernels of `select`: one program selects or replaces for one row, in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 2048  # scores of a row that a program takes first; only the best of each segment are looked at again
MAX_SCORES = 32768  # that one program keeps in registers
MAX_SLOTS = 4096
TOP_WARPS = 8  # more of them wait longer for each other than they save


@triton.jit
def _top_kernel(
    scores_ptr, from_ptr, names_ptr, ids_ptr, best_ptr, n, k, segment, names_stride_b, names_stride_h, kv_heads,
    FROM: tl.constexpr, NAMED: tl.constexpr, LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The k best of a segment of a row: ids and, but for the last round, scores of the next round's candidates."""
    row = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    j = tl.arange(0, BLOCK_N)
    i = part * segment + j
    inside = (j < segment) & (i < n)
    scores = tl.load(scores_ptr + row * n + i, mask=inside, other=float("-inf"))
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0.0 ties with 0.0
    # Integers in the order of the floats; the k-th largest is found two bits at a time, from the highest.
    bits = scores.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    least = tl.full([], -2147483648, tl.int32)
    for pair in range(16):
        quarter = tl.full([], 1, tl.int32) << (30 - 2 * pair)
        low, middle, high = least + quarter, least + quarter + quarter, least + quarter + quarter + quarter
        # Three counts in one sum: a reduction over all threads costs more than the comparisons.
        packed = (key >= low).to(tl.int64) + ((key >= middle).to(tl.int64) << 20) + ((key >= high).to(tl.int64) << 40)
        counts = tl.sum(packed, axis=0)
        least = tl.where((counts & 0xFFFFF) >= k, low, least)
        least = tl.where(((counts >> 20) & 0xFFFFF) >= k, middle, least)
        least = tl.where((counts >> 40) >= k, high, least)
    above = key > least
    equal = (key == least) & (scores > float("-inf"))
    spare = k - tl.sum(above.to(tl.int32), axis=0)
    # One scan counts both: those above in the low half, the ties in the high half.
    counted = tl.cumsum(above.to(tl.int64) + (equal.to(tl.int64) << 32), axis=0)
    n_above, n_equal = (counted & 0xFFFFFFFF).to(tl.int32), (counted >> 32).to(tl.int32)
    chosen = above | (equal & (n_equal <= spare))
    position = n_above + tl.minimum(n_equal, spare) - 1
    found = i.to(tl.int64)
    if FROM:
        found = tl.load(from_ptr + row * n + i, mask=chosen, other=-1)
    if NAMED:
        names = names_ptr + (row // kv_heads) * names_stride_b + (row % kv_heads) * names_stride_h
        found = tl.load(names + found, mask=chosen, other=-1)
    out = (row * parts + part) * k
    tl.store(ids_ptr + out + position, found, mask=chosen)
    rest = tl.arange(0, BLOCK_K)
    missing = (rest >= tl.sum(chosen.to(tl.int32), axis=0)) & (rest < k)
    tl.store(ids_ptr + out + rest, tl.full([BLOCK_K], -1, tl.int64), mask=missing)
    if not LAST:
        tl.store(best_ptr + out + position, scores, mask=chosen)
        tl.store(best_ptr + out + rest, tl.full([BLOCK_K], float("-inf"), tl.float32), mask=missing)


@triton.jit
def _replace_kernel(
    resident_ptr, new_ptr, fetch_ptr, taken_ptr, missed_ptr, slots, n,
    resident_stride_b, resident_stride_h, kv_heads,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    resident_row = resident_ptr + (row // kv_heads) * resident_stride_b + (row % kv_heads) * resident_stride_h
    new_row = new_ptr + row * n
    s, i = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_N)
    resident = tl.load(resident_row + s, mask=s < slots, other=-1)
    new = tl.load(new_row + i, mask=i < n, other=-1)

    # New ids ascend, so that a resident one is found among them by halving; it then marks that it was.
    known = tl.minimum(tl.sum((new >= 0).to(tl.int32), axis=0), n)
    first = tl.zeros([BLOCK_S], tl.int32)
    size = known + tl.zeros([BLOCK_S], tl.int32)
    for _ in range(ROUNDS):
        half = size // 2
        middle = first + half
        there = (size > 0) & (resident >= 0)
        before = there & (tl.load(new_row + middle, mask=there, other=0) < resident)
        first = tl.where(before, middle + 1, first)
        size = tl.where(before, size - half - 1, tl.where(there, half, size))
    candidate = (resident >= 0) & (first < known)
    found_resident = candidate & (tl.load(new_row + first, mask=candidate, other=-1) == resident)
    tl.store(taken_ptr + row * n + i, tl.full([BLOCK_N], -1, tl.int64), mask=i < n)
    tl.debug_barrier()
    tl.store(taken_ptr + row * n + first, s.to(tl.int64), mask=found_resident)
    tl.debug_barrier()
    missed = (new >= 0) & (tl.load(taken_ptr + row * n + i, mask=i < n, other=-1) < 0)
    rank_missed = tl.cumsum(missed.to(tl.int32), axis=0) - 1
    n_missed = tl.sum(missed.to(tl.int32), axis=0)
    tl.debug_barrier()  # marks are read before they are overwritten

    freed = (s < slots) & ~found_resident
    rank_freed = tl.cumsum(freed.to(tl.int32), axis=0) - 1

    # The r-th missed id goes to the r-th freed slot.
    none = tl.full([BLOCK_N], -1, tl.int64)
    tl.store(fetch_ptr + row * n + rank_missed, new, mask=missed)
    tl.store(fetch_ptr + row * n + i, none, mask=(i >= n_missed) & (i < n))
    tl.store(taken_ptr + row * n + rank_freed, s.to(tl.int64), mask=freed & (rank_freed < n_missed))
    tl.store(taken_ptr + row * n + i, none, mask=(i >= n_missed) & (i < n))
    tl.store(missed_ptr + row, n_missed.to(tl.int64))
    tl.debug_barrier()  # the fetched ids are read back by other threads of this program
    fetched = tl.load(fetch_ptr + row * n + rank_freed, mask=freed & (rank_freed < n_missed), other=-1)
    tl.store(resident_row + s, fetched, mask=freed)


def select_top(scores: Tensor, k: int, names: Tensor | None = None) -> Tensor:
    """`top_ids` of contiguous fp32 scores where `takes` says so; names (batch, kv_heads, n), rows contiguous."""
    device, n, of = scores.device, scores.shape[-1], None
    rows = scores.numel() // n
    segment = _segment(k)
    with torch.cuda.device_of(scores):
        while n > 2 * segment:  # candidates come in the order of their ids, so that ties stay where they were
            parts = triton.cdiv(n, segment)
            ids = torch.empty((rows, parts * k), dtype=torch.int64, device=device)
            best = torch.empty((rows, parts * k), dtype=torch.float32, device=device)
            _launch_top(scores, of, None, ids, best, rows, n, k, segment)
            scores, of, n = best, ids, parts * k
        found = torch.empty(
            (*names.shape[:-1], k) if names is not None else (rows, k), dtype=torch.int64, device=device
        )
        _launch_top(scores, of, names, found, None, rows, n, k, n)
    return found


def takes(n: int, k: int) -> bool:
    """Whether `select_top` finds the k best of n: its last round must fit a program."""
    return _segment(k) <= MAX_SCORES // 2 or n <= MAX_SCORES


def _segment(k: int) -> int:
    """Scores of a first round's program: four times as many as it passes on, so that rounds are few."""
    return max(SEGMENT, 4 * int(triton.next_power_of_2(k)))


def _launch_top(
    scores: Tensor,
    of: Tensor | None,
    names: Tensor | None,
    ids: Tensor,
    best: Tensor | None,
    rows: int,
    n: int,
    k: int,
    segment: int,
) -> None:
    block = triton.next_power_of_2(segment)
    heads, strides = (1, (0, 0)) if names is None else (names.shape[1], names.stride()[:2])
    _top_kernel[(rows, triton.cdiv(n, segment))](
        scores, of, names, ids, best, n, k, segment, *strides, heads,
        FROM=of is not None, NAMED=names is not None, LAST=best is None,
        BLOCK_N=block, BLOCK_K=triton.next_power_of_2(k), num_warps=min(TOP_WARPS, max(4, block // 512)),
    )  # fmt: skip


def replace(resident_ids: Tensor, new_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`replace_ascending` of at most `MAX_SLOTS` slots; new_ids contiguous."""
    batch, kv_heads, slots = resident_ids.shape
    n = new_ids.shape[2]
    fetch_ids, taken = torch.empty_like(new_ids), torch.empty_like(new_ids)
    n_missed = torch.empty((batch, kv_heads), dtype=torch.int64, device=new_ids.device)
    with torch.cuda.device_of(new_ids):
        _replace_kernel[(batch * kv_heads,)](
            resident_ids, new_ids, fetch_ids, taken, n_missed, slots, n,
            *resident_ids.stride()[:2], kv_heads,
            BLOCK_S=triton.next_power_of_2(slots), BLOCK_N=triton.next_power_of_2(n), ROUNDS=n.bit_length(),
            num_warps=8,
        )  # fmt: skip
    return fetch_ids, taken, n_missed
