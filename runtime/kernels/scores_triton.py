"""Triton kernel of `scores`: products of few queries with many rows, kept in fp32.

A library product of 16-bit inputs rounds its result to 16 bits, which merges scores that differ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 16 * 1024  # of rows that a program holds


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
