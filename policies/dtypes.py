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
        "mxfp4": 4,
        "int32": 32,
        "int64": 64,
        "bool": 8,
    }
)
"""Bits of one element, scales excluded."""

INT4_GROUP = 64
"""Elements that share one fp16 scale and one fp16 zero point (KIVI and AWQ use 32 to 128)."""

MXFP4_GROUP = 32
"""Elements that share one 8-bit exponent (OCP Microscaling Formats 1.0, section 5)."""


def check_dtype(dtype: str) -> None:
    """Raise ValueError, listing the known dtypes, when `dtype` is not one of them."""
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {shown(dtype)}; known: {', '.join(DTYPE_BITS)}")


def row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one contiguous row of `shape`, scales included, rounded up to a whole byte.

    Scales belong to the vectors along the last dimension: `int8` has one fp16 scale for each vector, `int4` one fp16
    scale and one fp16 zero point for each group of up to 64 elements, `mxfp4` one byte for each group of up to 32.

    Raises ValueError for an unknown dtype or a negative dimension.
    """
    check_dtype(dtype)
    if any(size < 0 for size in shape):
        raise ValueError(f"row shape {shape} has a negative dimension; every dimension is 0 or more")
    vector = shape[-1] if shape else 1
    bits = vector * DTYPE_BITS[dtype]
    if dtype == "int8":
        bits += 16 * min(vector, 1)
    elif dtype == "int4":
        bits += 32 * -(-vector // INT4_GROUP)
    elif dtype == "mxfp4":
        bits += 8 * -(-vector // MXFP4_GROUP)
    return -(-prod(shape[:-1]) * bits // 8)
