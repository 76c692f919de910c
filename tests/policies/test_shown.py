"""Values in errors: as Python writes them while they are short, and never more than a glance of them."""

import time

import pytest

from policies.shown import MOST_SHOWN, shown


@pytest.mark.parametrize("value", ["", "abc", "a'b", 7, -1.5, None, True, [1, "x"], {"a": 1}, "\x1b[2J\n", "é"])
def test_short_values_are_written_whole(value: object) -> None:
    assert shown(value) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10_000_000,
        ["y" * 99] * 1_000_000,
        {str(i): i for i in range(99_999)},
        10**100_000,
        [[[[[0] * 99] * 99]]],
    ],
    ids=["text", "list", "mapping", "number", "nested"],
)
def test_long_values_are_cut_without_being_written_out(value: object) -> None:
    began = time.process_time()
    assert len(shown(value)) <= MOST_SHOWN + 2
    assert time.process_time() - began < 0.1


def test_a_value_that_is_nested_without_end() -> None:
    nest: list[object] = []
    for _ in range(100_000):
        nest = [nest]
    assert len(shown(nest)) <= MOST_SHOWN
