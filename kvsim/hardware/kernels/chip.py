"""The datasheet's figures of a GPU that kernels are priced by, and the smooth maximum that joins two limits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.dtypes import DTYPE_BITS, GROUPS

_STAND_INS = {
    "bf16": ("bf16", "fp16"),  # chips before Ampere serve in fp16
    "fp16": ("fp16", "bf16"),
    "fp8": ("fp8",),
    "fp8_block": ("fp8",),
    "mxfp8": ("fp8",),
    "int8": ("int8",),
    "nvfp4": ("nvfp4",),
    "mxfp4": ("nvfp4",),
    "fp32": ("fp32",),
}
"""Types of products, in order, that a GPU may multiply a format in; else its weights are widened to 16 bits."""

GEMM_DTYPES = (*_STAND_INS, "int4", "int4-g32", "int4-g128")
"""Formats of weights that a GEMM is priced in: `fp8` has one scale a tensor, `fp8_block` one a block."""

KV_DTYPES = ("bf16", "fp16", "fp8")
"""Types of cached keys and values that attention is priced over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One GPU's datasheet: rates that no kernel exceeds."""

    hbm_Bps: float
    flops: tuple[tuple[str, float], ...]  # dense peaks by type
    sms: int
    nvlink_Bps: float  # to the peers, each way; 0: none
    pcie_h2d_Bps: float
    pcie_d2h_Bps: float

    def product(self, dtype: str) -> tuple[str, float]:
        """The type that products with weights of `dtype` run in, and its peak in FLOP/s.

        Where the chip has no units for `dtype`, weights are widened as they stream and multiplied in 16 bits.
        """
        peaks = dict(self.flops)
        for known in (*_STAND_INS.get(dtype, ()), "bf16", "fp16", "fp32"):
            if known in peaks:
                return known, peaks[known]
        raise ValueError(f"this GPU has no GEMM rate at all; it has {', '.join(peaks)}")

    @property
    def half_flops(self) -> float:
        """Peak of 16-bit products, which attention runs in."""
        return self.product("bf16")[1]


def element_bytes(dtype: str) -> float:
    """Bytes of one stored element, scales included."""
    if dtype == "fp8_block":  # one fp32 scale for 128 x 128 elements
        return 1 + 4 / 128**2
    elements, shared_bits = GROUPS.get(dtype, (1, 0))
    return (DTYPE_BITS[dtype] + shared_bits / elements) / 8


def smooth_max(sharpness: float, *times: float) -> float:
    """The p-norm of times that overlap: no less than the largest, and no more than their sum where p is 1 or more."""
    largest = max(times)
    if not largest:
        return 0.0
    return float(largest * sum((time / largest) ** sharpness for time in times) ** (1 / sharpness))


def smooth_max_of(sharpness: float, *times: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same of columns of times, row by row."""
    largest: NDArray[np.float64] = np.maximum.reduce(times)
    scale = np.where(largest > 0, largest, 1.0)
    powers: NDArray[np.float64] = np.add.reduce([(time / scale) ** sharpness for time in times])
    joined: NDArray[np.float64] = largest * powers ** (1 / sharpness)
    return joined
