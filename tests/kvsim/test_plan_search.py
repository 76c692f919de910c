"""Brackets: what holds and what breaks stand next to each other, both were asked for, and few others were."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.planning.search import Bracket, Search, largest, smallest


def played(search: Search, ratio: Callable[[int], float]) -> tuple[Bracket, list[int]]:
    asked: list[int] = []
    size = next(search)
    while True:
        asked.append(size)
        try:
            size = search.send(ratio(size))
        except StopIteration as end:
            return end.value, asked


@given(
    need=st.integers(1, 400),
    start=st.integers(1, 500),
    power=st.floats(0.3, 6),
    least=st.sampled_from([1, 2]),
)
def test_the_smallest_that_holds_is_found(need: int, start: int, power: float, least: int) -> None:
    bracket, asked = played(smallest(start, least, 512), lambda n: (need / n) ** power)
    fewest = max(need, least)
    assert bracket == Bracket(fewest, fewest - 1 if fewest > least else None, fewest)
    assert bracket.breaks is None or bracket.breaks in asked
    assert fewest in asked
    assert len(asked) == len(set(asked)) <= 24
    assert all(least <= size <= 512 for size in asked)


@given(need=st.integers(1, 400), start=st.integers(1, 500))
def test_it_needs_no_figures_but_only_whether_a_size_holds(need: int, start: int) -> None:
    bracket, _ = played(smallest(start, 1, 512), lambda n: 0.5 if n >= need else math.inf)
    assert bracket == Bracket(need, need - 1 if need > 1 else None, need)


def test_a_good_start_takes_two() -> None:
    _, asked = played(smallest(16, 1, 512), lambda n: (15.5 / n) ** 2)
    assert asked == [16, 15]


def test_what_more_replicas_do_not_mend_is_given_up() -> None:
    bracket, asked = played(smallest(4, 1, 512), lambda n: 3.0 + 1e-3 / n)
    assert bracket.holds is None
    assert len(asked) < 4


def test_no_more_than_the_most_is_asked_for() -> None:
    bracket, asked = played(smallest(3, 1, 10), lambda n: (100 / n) ** 2)
    assert bracket == Bracket(None, 10, 10)
    assert max(asked) == 10


@given(most=st.integers(-40, 60), start=st.integers(-30, 30))
def test_the_largest_load_that_holds_is_found(most: int, start: int) -> None:
    bracket, asked = played(largest(start, -60, 80), lambda n: 1.05 ** (3 * (n - most)))
    assert bracket == Bracket(most, most + 1, most)
    assert {most, most + 1} <= set(asked)


@pytest.mark.parametrize("holds", [True, False])
def test_a_single_size_is_asked_for_once(holds: bool) -> None:
    bracket, asked = played(smallest(9, 7, 7), lambda _: 0.9 if holds else 1.1)
    assert bracket == Bracket(7 if holds else None, None if holds else 7, 7)
    assert asked == [7]
