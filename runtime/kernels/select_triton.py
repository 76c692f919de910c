"""Triton kernels of `select`: one program selects or replaces for one row, in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SCORES = 32768  # that one program keeps in registers
MAX_SLOTS = 4096
TOP_WARPS = 8  # more of them wait longer for each other than they save


@triton.jit
def _top_kernel(scores_ptr, ids_ptr, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    scores = tl.load(scores_ptr + row * n + i, mask=i < n, other=float("-inf"))
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
    tl.store(ids_ptr + row * k + position, i.to(tl.int64), mask=chosen)
    rest = tl.arange(0, BLOCK_K)
    none = tl.full([BLOCK_K], -1, tl.int64)
    tl.store(ids_ptr + row * k + rest, none, mask=(rest >= tl.sum(chosen.to(tl.int32), axis=0)) & (rest < k))


@triton.jit
def _replace_kernel(
    resident_ptr, new_ptr, fetch_ptr, taken_ptr, missed_ptr, slots, n,
    resident_stride_b, resident_stride_h, kv_heads,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    resident_row = resident_ptr + (row // kv_heads) * resident_stride_b + (row % kv_heads) * resident_stride_h
    new_row = new_ptr + row * n
    s, i = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_N)
    resident = tl.load(resident_row + s, mask=s < slots, other=-1)
    new = tl.load(new_row + i, mask=i < n, other=-1)

    found_new = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, slots, STEP):
        other = start + tl.arange(0, STEP)
        ids = tl.load(resident_row + other, mask=other < slots, other=-1)
        found_new |= tl.max((new[:, None] == ids[None, :]).to(tl.int32), axis=1)
    missed = (new >= 0) & (found_new == 0)
    rank_missed = tl.cumsum(missed.to(tl.int32), axis=0) - 1
    n_missed = tl.sum(missed.to(tl.int32), axis=0)

    found_resident = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, n, STEP):
        other = start + tl.arange(0, STEP)
        ids = tl.load(new_row + other, mask=other < n, other=-1)
        found_resident |= tl.max((resident[:, None] == ids[None, :]).to(tl.int32), axis=1)
    freed = (s < slots) & ((resident < 0) | (found_resident == 0))
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


def select_top(scores: Tensor, k: int) -> Tensor:
    """`top_ids` of contiguous fp32 scores, at most `MAX_SCORES` a row."""
    n = scores.shape[-1]
    ids = torch.empty((*scores.shape[:-1], k), dtype=torch.int64, device=scores.device)
    block = triton.next_power_of_2(n)
    with torch.cuda.device_of(scores):
        _top_kernel[(scores.numel() // n,)](
            scores,
            ids,
            n,
            k,
            BLOCK_N=block,
            BLOCK_K=triton.next_power_of_2(k),
            num_warps=min(TOP_WARPS, max(4, block // 512)),
        )
    return ids


def replace(resident_ids: Tensor, new_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`replace_in_place` of at most `MAX_SLOTS` slots; new_ids contiguous."""
    batch, kv_heads, slots = resident_ids.shape
    n = new_ids.shape[2]
    fetch_ids, taken = torch.empty_like(new_ids), torch.empty_like(new_ids)
    n_missed = torch.empty((batch, kv_heads), dtype=torch.int64, device=new_ids.device)
    with torch.cuda.device_of(new_ids):
        _replace_kernel[(batch * kv_heads,)](
            resident_ids, new_ids, fetch_ids, taken, n_missed, slots, n,
            *resident_ids.stride()[:2], kv_heads,
            BLOCK_S=triton.next_power_of_2(slots), BLOCK_N=triton.next_power_of_2(n), STEP=16, num_warps=8,
        )  # fmt: skip
    return fetch_ids, taken, n_missed
