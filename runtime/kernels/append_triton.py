"""Triton kernel of `append`: one program writes the key and the value of one head."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write_row_kernel(
    k_ptr, v_ptr, new_k_ptr, new_v_ptr, row_ptr,
    k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t,
    new_k_stride_b, new_k_stride_h,
    new_v_stride_b, new_v_stride_h,
    kv_heads,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    h = (tl.program_id(0) % kv_heads).to(tl.int64)
    row = tl.load(row_ptr)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k = tl.load(new_k_ptr + b * new_k_stride_b + h * new_k_stride_h + d, mask=d < HEAD_DIM)
    v = tl.load(new_v_ptr + b * new_v_stride_b + h * new_v_stride_h + dv, mask=dv < V_DIM)
    tl.store(k_ptr + b * k_stride_b + h * k_stride_h + row * k_stride_t + d, k, mask=d < HEAD_DIM)
    tl.store(v_ptr + b * v_stride_b + h * v_stride_h + row * v_stride_t + dv, v, mask=dv < V_DIM)


def write_row(keys: Tensor, values: Tensor, new_k: Tensor, new_v: Tensor, row: Tensor) -> None:
    """`append_row` of checked arguments."""
    new_k, new_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (new_k, new_v))
    batch, kv_heads, _, head_dim = new_k.shape
    v_dim = new_v.shape[3]
    with torch.cuda.device_of(keys):
        _write_row_kernel[(batch * kv_heads,)](
            keys, values, new_k, new_v, row,
            *keys.stride()[:3], *values.stride()[:3], *new_k.stride()[:2], *new_v.stride()[:2], kv_heads,
            HEAD_DIM=head_dim, V_DIM=v_dim,
            BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_V=triton.next_power_of_2(v_dim), num_warps=1,
        )  # fmt: skip
