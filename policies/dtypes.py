"""Sizes of stored elements, quantised ones with their scales."""

from collections.abc import Mapping
from math import prod
from types import MappingProxyType

from policies.shown import shown

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "fp32": 32,
        "bf16": 16,
        "fp16": 16,
        "fp8": 8,
        "int8": 8,
        "int4": 4,
        "int4-g32": 4,
        "int4-g128": 4,
        "mxfp8": 8,
        "mxfp4": 4,
        "nvfp4": 4,
        "int32": 32,
        "int64": 64,
        "bool": 8,
    }
)
"""Bits of one element, scales excluded."""

GROUPS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "int4": (64, 32),  # an fp16 scale and an fp16 zero point; KIVI and AWQ use groups of 32 to 128
        "int4-g32": (32, 32),
        "int4-g128": (128, 32),
        "mxfp8": (32, 8),  # an 8-bit exponent (OCP Microscaling Formats 1.0, section 5)
        "mxfp4": (32, 8),
        "nvfp4": (16, 8),  # an fp8 scale; the one in fp32 is of a whole tensor, so of no row
    }
)
"""Elements that share a scale, and bits of what they share."""


def check_dtype(dtype: str) -> None:
    """Raise ValueError, listing the known dtypes, when `dtype` is not one of them."""
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {shown(dtype)}; known: {', '.join(DTYPE_BITS)}")


def row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one contiguous row of `shape`, scales included, rounded up to a whole byte.

    Scales belong to the vectors along the last dimension: `int8` has one fp16 scale for each vector, `int4` one fp16
    scale and one fp16 zero point for each group of up to 64 elements (or as its name says), `mxfp4` and `mxfp8` one
    byte for each group of up to 32, `nvfp4` one for each of up to 16.

    Raises ValueError for an unknown dtype or a negative dimension.
    """
    check_dtype(dtype)
    if any(size < 0 for size in shape):
        raise ValueError(f"row shape {shape} has a negative dimension; every dimension is 0 or more")
    vector = shape[-1] if shape else 1
    bits = vector * DTYPE_BITS[dtype]
    if dtype == "int8":
        bits += 16 * min(vector, 1)
    elif dtype in GROUPS:
        elements, shared_bits = GROUPS[dtype]
        bits += shared_bits * -(-vector // elements)
    return -(-prod(shape[:-1]) * bits // 8)
