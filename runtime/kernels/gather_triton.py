"""Triton kernel of `gather`: threads read the rows themselves, from HBM or straight from pinned host memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 8 * 1024  # that a program holds in registers: enough loads in flight to hide the bus


@triton.jit
def _copy_rows_kernel(
    src_ptr, ids_ptr, dst_ptr, slots_ptr, counter_ptr,
    src_stride_b, src_stride_h, src_stride_r,
    dst_stride_b, dst_stride_h, dst_stride_r,
    ids_stride_b, ids_stride_h, ids_stride_n,
    slots_stride_b, slots_stride_h, slots_stride_n,
    kv_heads, n, width,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    h = (tl.program_id(0) % kv_heads).to(tl.int64)
    i = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    ids = tl.load(ids_ptr + b * ids_stride_b + h * ids_stride_h + i * ids_stride_n, mask=i < n, other=-1).to(tl.int64)
    copied = ids >= 0
    slots = tl.load(slots_ptr + b * slots_stride_b + h * slots_stride_h + i * slots_stride_n, mask=copied, other=0)
    src_rows = src_ptr + b * src_stride_b + h * src_stride_h + ids * src_stride_r
    dst_rows = dst_ptr + b * dst_stride_b + h * dst_stride_h + slots.to(tl.int64) * dst_stride_r
    for start in range(0, width, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)
        inside = copied[:, None] & (column < width)[None, :]
        tl.store(dst_rows[:, None] + column[None, :], tl.load(src_rows[:, None] + column[None, :], mask=inside), inside)
    tl.atomic_add(counter_ptr, tl.sum(copied.to(tl.int64), axis=0))


def copy_rows(src: Tensor, ids: Tensor, dst: Tensor, slots: Tensor, counter: Tensor) -> None:
    """`gather_rows` of checked arguments."""
    batch, kv_heads, _, width = src.shape
    n = ids.shape[2]
    tile = TILE_BYTES // src.element_size()
    block_w = min(tile, triton.next_power_of_2(width))
    block_r = tile // block_w
    with torch.cuda.device_of(dst):
        _copy_rows_kernel[(batch * kv_heads, triton.cdiv(n, block_r))](
            src, ids, dst, slots, counter,
            *src.stride()[:3], *dst.stride()[:3], *ids.stride(), *slots.stride(),
            kv_heads, n, width,
            BLOCK_R=block_r, BLOCK_W=block_w,
        )  # fmt: skip
