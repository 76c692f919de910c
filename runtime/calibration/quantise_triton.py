"""A kernel that quantises activations to fp8 under one scale, as engines launch before a GEMM."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _quantise_kernel(values_ptr, narrow_ptr, scale_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(values_ptr + at, mask=at < n).to(tl.float32) / tl.load(scale_ptr)
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    tl.store(narrow_ptr + at, scaled.to(tl.float8e4nv), mask=at < n)


def quantise(values: Tensor, narrow: Tensor, scale: Tensor) -> None:
    """Write contiguous 16-bit `values` over a scale as fp8."""
    n = values.numel()
    _quantise_kernel[(triton.cdiv(n, 2048),)](values, narrow, scale, n, BLOCK=2048)


def quantised(values: Tensor) -> Tensor:
    """The same values in fp8, with a scale of 1."""
    narrow = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    quantise(values, narrow, torch.ones((), device=values.device))
    return narrow
