"""Bytes of rows, against counts by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.dtypes import DTYPE_BITS, row_bytes


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((8, 128), "bf16", 8 * 128 * 2),
        ((8, 128), "fp8", 1024),  # no scales
        ((8, 128), "int8", 8 * (128 + 2)),  # one fp16 scale for each of 8 vectors
        ((128,), "int4", 64 + 2 * 4),  # 128 nibbles, two groups of 64 with scale and zero point
        ((8, 80), "int4", 8 * (40 + 2 * 4)),  # 80 = 64 + 16: two groups as well
        ((3,), "int4", 2 + 4),  # 12 bits of elements and 32 of the group: 5.5 bytes, rounded up
        ((2, 1), "int4", 1 + 2 * 4),  # two nibbles pack into one byte
        ((2880,), "mxfp4", 1440 + 90),  # 90 blocks of 32, one exponent byte each
        ((2880,), "mxfp8", 2880 + 90),
        ((2880,), "nvfp4", 1440 + 180),  # 180 blocks of 16, one fp8 scale each
        ((256,), "int4-g128", 128 + 2 * 4),
        ((256,), "int4-g32", 128 + 8 * 4),
        ((576,), "fp32", 2304),
        ((), "int64", 8),
        ((4, 0), "int8", 0),
    ],
)
def test_row_bytes_by_hand(shape: tuple[int, ...], dtype: str, expected: int) -> None:
    assert row_bytes(shape, dtype) == expected


@given(
    shape=st.lists(st.integers(0, 300), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(["fp32", "bf16", "fp8", "int32", "bool"]),
)
def test_unscaled_types_cost_their_bits(shape: tuple[int, ...], dtype: str) -> None:
    elements = 1
    for size in shape:
        elements *= size
    assert row_bytes(shape, dtype) * 8 == elements * DTYPE_BITS[dtype]


@given(width=st.integers(1, 1000), rows=st.integers(1, 9))
def test_int4_costs_between_four_and_a_half_bits_and_one_group_more(width: int, rows: int) -> None:
    bits = row_bytes((rows, width), "int4") * 8
    assert 4.5 * rows * width <= bits <= 4.5 * rows * width + 32 * rows + 7


def test_unknown_dtype_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown dtype 'fp7'; known: fp32, bf16, fp16, fp8, int8, int4"):
        row_bytes((8,), "fp7")


def test_negative_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row shape \(2, -1\) has a negative dimension"):
        row_bytes((2, -1), "bf16")
