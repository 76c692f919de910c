"""Triton kernel of `scores`: products of few queries with many rows, kept in fp32.

A library product of 16-bit inputs rounds its result to 16 bits, which merges scores that differ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 16 * 1024  # of rows that a program holds
MASS_ROWS = 512  # whose weights a program computes
MOST_BLOCKS = 2048  # of logits, whose sums a program holds


@triton.jit
def _products_kernel(
    q_ptr, rows_ptr, out_ptr,
    q_stride_b, q_stride_h, q_stride_m,
    rows_stride_b, rows_stride_h, rows_stride_n,
    kv_heads, queries, n,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    h = (tl.program_id(0) % kv_heads).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    query = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q_rows = q_ptr + b * q_stride_b + h * q_stride_h + query.to(tl.int64) * q_stride_m
    q = tl.load(q_rows[:, None] + d[None, :], mask=(query < queries)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    k_rows = rows_ptr + b * rows_stride_b + h * rows_stride_h + row.to(tl.int64) * rows_stride_n
    k = tl.load(k_rows[:, None] + d[None, :], mask=(row < n)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    out = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    out_rows = out_ptr + (tl.program_id(0).to(tl.int64) * queries + query) * n
    tl.store(out_rows[:, None] + row[None, :], out, mask=(query < queries)[:, None] & (row < n)[None, :])


def fits(queries: int, n: int) -> bool:
    """Whether `largest_mass` takes so many queries and landmarks."""
    return queries <= 64 and n <= MOST_BLOCKS * 16


def products(q: Tensor, rows: Tensor) -> Tensor:
    """fp32 `q @ rows.mT`: q `(batch, kv_heads, queries, head_dim)`, rows `(batch, kv_heads, n, head_dim)`."""
    q, rows = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, rows))
    batch, kv_heads, queries, head_dim = q.shape
    n = rows.shape[2]
    out = torch.empty((batch, kv_heads, queries, n), dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m = min(64, max(16, triton.next_power_of_2(queries)))
    block_n = min(128, max(16, TILE_BYTES // (block_d * rows.element_size())))
    with torch.cuda.device_of(q):
        _products_kernel[(batch * kv_heads, triton.cdiv(n, block_n), triton.cdiv(queries, block_m))](
            q, rows, out, *q.stride()[:3], *rows.stride()[:3], kv_heads, queries, n,
            HEAD_DIM=head_dim, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        )  # fmt: skip
    return out


@triton.jit
def _landmark_logits_kernel(
    q_ptr, rows_ptr, valid_ptr, out_ptr, largest_ptr, total_ptr,
    q_stride_b, q_stride_h, q_stride_m,
    rows_stride_b, rows_stride_h, rows_stride_n,
    valid_stride_b, valid_stride_h, valid_stride_n,
    kv_heads, queries, n, scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, HAS_VALID: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of a block of landmarks, and for each query what the block adds to its softmax."""
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    h = (tl.program_id(0) % kv_heads).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    query, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_rows = q_ptr + b * q_stride_b + h * q_stride_h + query.to(tl.int64) * q_stride_m
    q = tl.load(q_rows[:, None] + d[None, :], mask=(query < queries)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    there = row < n
    k_rows = rows_ptr + b * rows_stride_b + h * rows_stride_h + row.to(tl.int64) * rows_stride_n
    k = tl.load(k_rows[:, None] + d[None, :], mask=there[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if HAS_VALID:
        at = valid_ptr + b * valid_stride_b + h * valid_stride_h + row * valid_stride_n
        there = there & (tl.load(at, mask=there, other=0) != 0)
    logits = tl.where(there[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
    largest = tl.max(logits, axis=1)
    total = tl.sum(tl.exp(logits - tl.where(largest == float("-inf"), 0.0, largest)[:, None]), axis=1)
    out_rows = out_ptr + (tl.program_id(0).to(tl.int64) * queries + query) * n
    tl.store(out_rows[:, None] + row[None, :], logits, mask=(query < queries)[:, None] & (row < n)[None, :])
    stat = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * BLOCK_M + query
    tl.store(largest_ptr + stat, largest)
    tl.store(total_ptr + stat, total)


@triton.jit
def _landmark_mass_kernel(
    logits_ptr, largest_ptr, total_ptr, out_ptr, queries, n, blocks,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The largest weight of each landmark among the queries, -inf where none may have it."""
    block, query = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_M)
    at = (tl.program_id(0) * blocks + block[:, None]) * BLOCK_M + query[None, :]
    some = (block < blocks)[:, None] & (query < queries)[None, :]
    each = tl.load(largest_ptr + at, mask=some, other=float("-inf"))
    largest = tl.max(each, axis=0)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.load(total_ptr + at, mask=some, other=0.0) * tl.exp(each - reference[None, :]), axis=0)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (query < queries)[:, None] & (row < n)[None, :]
    rows = logits_ptr + (tl.program_id(0).to(tl.int64) * queries + query) * n
    logits = tl.load(rows[:, None] + row[None, :], mask=inside, other=float("-inf"))
    mass = tl.exp(logits - reference[:, None]) / tl.where(total > 0, total, 1.0)[:, None]
    mass = tl.where(logits > float("-inf"), mass, float("-inf"))
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * n + row, tl.max(mass, axis=0), mask=row < n)


def largest_mass(q: Tensor, rows: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """`landmark_scores` of one new token by `max`: q `(batch, kv_heads, queries, head_dim)`, `valid` of rows' shape."""
    q, rows = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, rows))
    batch, kv_heads, queries, head_dim = q.shape
    n = rows.shape[2]
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m = max(16, triton.next_power_of_2(queries))
    block_n = min(128, max(16, TILE_BYTES // (block_d * rows.element_size())))
    blocks = triton.cdiv(n, block_n)
    logits = torch.empty((batch, kv_heads, queries, n), dtype=torch.float32, device=q.device)
    largest, total = torch.empty((2, batch * kv_heads, blocks, block_m), dtype=torch.float32, device=q.device)
    out = torch.empty((batch, kv_heads, n), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _landmark_logits_kernel[(batch * kv_heads, blocks)](
            q, rows, valid, logits, largest, total, *q.stride()[:3], *rows.stride()[:3],
            *((0,) * 3 if valid is None else valid.stride()), kv_heads, queries, n, scale,
            HEAD_DIM=head_dim, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", HAS_VALID=valid is not None,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        )  # fmt: skip
        _landmark_mass_kernel[(batch * kv_heads, triton.cdiv(n, MASS_ROWS))](
            logits, largest, total, out, queries, n, blocks,
            BLOCK_B=triton.next_power_of_2(blocks), BLOCK_M=block_m, BLOCK_N=MASS_ROWS,
        )  # fmt: skip
    return out
