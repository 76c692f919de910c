"""What one GPU does per second, by one parameter set."""

import math
from dataclasses import dataclass
from itertools import pairwise

from policies.shown import shown

Curve = tuple[tuple[int, float], ...]
"""Rate in B/s by size of a contiguous row in bytes, ascending."""

_HALVES = ("bf16", "fp16", "fp32")
_INSTEAD = {"mxfp8": ("fp8", *_HALVES)}
"""Types to compute in, in order, where a chip has no rate for one; 16 bits, then 32, for all others."""


def interpolate(curve: Curve, row_bytes: int) -> float:
    """The curve at `row_bytes`: linear in the logarithm of the row size, flat beyond both ends."""
    if row_bytes <= curve[0][0]:
        return curve[0][1]
    for (low, low_Bps), (high, high_Bps) in pairwise(curve):
        if row_bytes <= high:
            share = math.log(row_bytes / low) / math.log(high / low)
            return low_Bps + share * (high_Bps - low_Bps)
    return curve[-1][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one GPU does per second, and what an operation costs before it starts, by one parameter set."""

    hbm_Bps: float  # streaming reads, as in decode
    matmul_flops: tuple[tuple[str, float], ...]  # dense FLOP/s of large GEMMs by dtype
    attention_flops: float  # prefill attention, 16-bit, causal count
    elementwise_Bps: float  # softmax and reductions over scores in HBM
    topk_elements_per_s: float
    launch_s: float  # one kernel in a CUDA graph or a well filled stream
    sync_s: float  # host synchronisation, there and back
    pcie_h2d_Bps: float  # the link to the host: PCIe, or NVLink-C2C
    pcie_d2h_Bps: float
    pcie_latency_s: float  # one copy, before its first byte
    gather_curve: Curve  # a kernel that reads rows straight from pinned host memory
    gather_sm_share: float  # of the SMs, occupied by such a kernel
    nvlink_Bps: float  # to the peers, each way; 0: none
    nvlink_latency_s: float

    def flops(self, dtype: str) -> float:
        """FLOP/s of large GEMMs in `dtype`; ValueError when this chip has no rate for it."""
        rates = dict(self.matmul_flops)
        if dtype not in rates:
            raise ValueError(
                f"this GPU has no GEMM rate for dtype {shown(dtype)}; it has {', '.join(rates)}; "
                "give its file a rate for it in matmul_flops, or choose another --weight-dtype"
            )
        return rates[dtype]

    def product_flops(self, dtype: str) -> float:
        """FLOP/s of products with weights of `dtype`, in another type where this chip has no rate for it.

        Weight-only formats multiply in 16 bits. Chips before Ampere have no bf16, and engines serve in fp16 there: vLLM
        refuses bf16 below compute capability 8.0 and names fp16. ValueError when nothing that stands in has a rate.
        """
        rates = dict(self.matmul_flops)
        for known in (dtype, *_INSTEAD.get(dtype, _HALVES)):
            if known in rates:
                return rates[known]
        return self.flops(dtype)

    def gather_Bps(self, row_bytes: int) -> float:
        """Rate at which a kernel reads rows of `row_bytes` straight from pinned host memory."""
        return interpolate(self.gather_curve, row_bytes)
