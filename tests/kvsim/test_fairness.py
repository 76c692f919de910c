"""Jain's index against its definition, and service under contention against a count by hand."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.results.fairness import Tenancy, fairness, jain_index
from kvsim.scenario.tenants import Tenant

NAMES = ["a", "b", "c"]


def table(rows: list[tuple[int, float, float, float, float, int, int]], **columns: Any) -> dict[str, np.ndarray]:
    """(replica, arrival, admitted, first token, finish, prompt, output) of each request."""
    names = ("replica", "arrival_s", "admitted_s", "first_token_s", "finish_s", "prompt_tokens", "output_tokens")
    requests = {name: np.array(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    requests["cached_tokens"] = np.zeros(len(rows), int)
    requests["status"] = np.where(np.isnan(requests["finish_s"]), "rejected", "finished")
    return requests | columns


# `a` waits from 0 to 4 and from 10 to 12, `b` from 2 to 6, at one replica: they contend from 2 to 4. `c` is elsewhere.
BY_HAND = [
    (0, 0.0, 4.0, 8.0, 16.0, 100, 50),  # its prefill and decoding begin when it no longer waits
    (0, 0.0, 1.0, 3.0, 5.0, 300, 20),  # prefill 1 of 2 s in 2..4, decoding 1 of 2 s
    (0, 2.0, 6.0, 7.0, 9.0, 40, 30),  # admitted after 4
    (0, 1.0, 1.0, 2.0, 10.0, 10, 80),  # decodes through all of 2..4: a quarter
    (1, 0.0, 9.0, 10.0, 11.0, 70, 7),
    (0, 10.0, 12.0, 13.0, 14.0, 60, 6),  # waits alone
    (0, 3.0, np.nan, np.nan, np.nan, 999, 9),  # rejected
]
MEMBERS = np.array([0, 0, 1, 1, 2, 0, 1])


def test_service_under_contention_by_hand() -> None:
    tenancy = Tenancy(terms={"b": Tenant(weight=2)})
    result = fairness(table(BY_HAND), NAMES, MEMBERS, tenancy)
    a, b, c = (result["tenants"][name] for name in NAMES)
    assert [x["contended_s"] for x in (a, b, c)] == [2.0, 2.0, 0.0]
    assert a["contended_service"] == pytest.approx(300 / 2 + 2 * 20 / 2)
    assert b["contended_service"] == pytest.approx(2 * 80 / 4)
    assert a["service"] == 100 + 300 + 60 + 2 * (50 + 20 + 6)
    assert (b["service"], b["weighted_service"]) == (50 + 2 * 110, (50 + 2 * 110) / 2)
    rates = np.array([170 / 2, 40 / 2 / 2])
    assert result["contended_jain_index"] == pytest.approx(rates.sum() ** 2 / (2 * (rates**2).sum()))
    x = np.array([a["service"], b["service"] / 2, c["service"]])
    assert result["jain_index"] == pytest.approx(x.sum() ** 2 / (3 * (x**2).sum()))


def test_cached_tokens_are_no_service_and_nobody_contends_alone() -> None:
    requests = table(BY_HAND[:2], cached_tokens=np.array([60, 300]))
    result = fairness(requests, ["a"], np.zeros(2, int), Tenancy(prompt_token_weight=3.0, output_token_weight=1.0))
    assert result["tenants"]["a"]["service"] == 3 * 40 + 70
    assert (result["jain_index"], result["contended_jain_index"]) == (1.0, None)


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=20), st.integers(2, 5))
def test_jains_index_is_within_its_bounds_and_blind_to_scale(shares: list[float], times: int) -> None:
    x, once = np.array(shares), np.ones(len(shares))
    index = jain_index(x, once)
    assert index is not None
    assert 1 / len(x) - 1e-12 <= index <= 1 + 1e-12
    assert jain_index(1000 * x, once) == pytest.approx(index)
    # A share that counts several times is that many equal shares.
    assert jain_index(x, times * once) == pytest.approx(jain_index(np.repeat(x, times), np.ones(times * len(x))))


def test_jains_index_of_k_equal_shares_and_nothing_else_is_k_of_n() -> None:
    assert jain_index(np.array([5.0, 5.0, 0.0, 0.0, 0.0]), np.ones(5)) == pytest.approx(2 / 5)
    assert jain_index(np.zeros(3), np.ones(3)) is None
