"""Triton kernel of `lowrank`: rows of a low-rank product, rotated, straight to the slots where they belong."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # tokens that a program rebuilds
RANK_TILE = 32  # of the product's inner dimension at once


@triton.jit
def _rebuild_kernel(
    u_ptr, sv_ptr, cos_ptr, sin_ptr, ids_ptr, dst_ptr, slots_ptr,
    u_stride_b, u_stride_t,
    sv_stride_b, sv_stride_h, sv_stride_r,
    table_stride_b, table_stride_t,
    ids_stride_b, ids_stride_h,
    dst_stride_b, dst_stride_h, dst_stride_s,
    slots_stride_b, slots_stride_h,
    kv_heads, n, rank,
    CHUNK: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    h = (tl.program_id(0) % kv_heads).to(tl.int64)
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    i, within = row // CHUNK, row % CHUNK
    chunk = tl.load(ids_ptr + b * ids_stride_b + h * ids_stride_h + i, mask=i < n, other=-1).to(tl.int64)
    some = chunk >= 0
    token = tl.where(some, chunk, 0) * CHUNK + within
    d, r = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    half = (d < HALF)[None, :]
    u_rows = u_ptr + b * u_stride_b + token * u_stride_t
    sv_head = sv_ptr + b * sv_stride_b + h * sv_stride_h
    low = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    high = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    last = tl.where(tl.max(some.to(tl.int32), axis=0) > 0, rank, 0)  # nothing was missed: nothing is read
    for start in range(0, last, BLOCK_R):
        at = start + r
        u = tl.load(u_rows[:, None] + at[None, :], mask=some[:, None] & (at < rank)[None, :], other=0.0)
        columns = sv_head + at[:, None] * sv_stride_r + d[None, :]
        there = (at < rank)[:, None] & half
        low = tl.dot(u, tl.load(columns, mask=there, other=0.0), low, input_precision=PRECISION)
        high = tl.dot(u, tl.load(columns + HALF, mask=there, other=0.0), high, input_precision=PRECISION)
    there = some[:, None] & half
    angle = (b * table_stride_b + token * table_stride_t)[:, None] + d[None, :]
    cos_low = tl.load(cos_ptr + angle, mask=there, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + angle + HALF, mask=there, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + angle, mask=there, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + angle + HALF, mask=there, other=0.0).to(tl.float32)
    slot = tl.load(slots_ptr + b * slots_stride_b + h * slots_stride_h + i, mask=some, other=0).to(tl.int64)
    to = dst_ptr + b * dst_stride_b + h * dst_stride_h + slot * dst_stride_s + within * (2 * HALF)
    tl.store(to[:, None] + d[None, :], low * cos_low - high * sin_low, mask=there)
    tl.store(to[:, None] + HALF + d[None, :], high * cos_high + low * sin_high, mask=there)


def rebuild_halves(
    u: Tensor, sv: Tensor, cos: Tensor, sin: Tensor, ids: Tensor, dst: Tensor, slots: Tensor, chunk_tokens: int
) -> None:
    """`rebuild_chunks` of keys that are rotated whole, in halves."""
    batch, kv_heads, n = ids.shape
    half = sv.shape[3] // 2
    cos, sin = (x.expand(batch, -1, -1) for x in (cos, sin))
    with torch.cuda.device_of(dst):
        _rebuild_kernel[(batch * kv_heads, triton.cdiv(n * chunk_tokens, ROWS))](
            u, sv, cos, sin, ids, dst, slots,
            *u.stride()[:2], *sv.stride()[:3], *cos.stride()[:2], *ids.stride()[:2], *dst.stride()[:3],
            *slots.stride()[:2], kv_heads, n, u.shape[2],
            CHUNK=chunk_tokens, HALF=half, PRECISION="ieee" if u.dtype == torch.float32 else "tf32",
            BLOCK_T=ROWS, BLOCK_R=RANK_TILE, BLOCK_D=max(16, triton.next_power_of_2(half)),
        )  # fmt: skip
