"""The summary of a result: figures by hand, percentiles against a definition, and the contract's keys."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.results.fairness import Tenancy
from kvsim.results.summary import Result, latencies, plain, statistics, summarize
from kvsim.scenario.tenants import Tenant

Make = Callable[..., Result]
NAN = math.nan
OF_TENANTS = {
    *("weight", "priority", "quota", "slo_class", "slo", "kv_peak_bytes"),
    *("service", "weighted_service", "contended_s", "contended_service"),
}

# Four requests of two tenants; the third was rejected. Times are chosen so that every latency can be read off.
BY_HAND: dict[str, Any] = {
    "requests": {
        "request": np.arange(4),
        "tenant": np.array(["b", "a", "a", "a"]),
        "session": np.arange(4),
        "replica": np.zeros(4, np.int64),
        "arrival_s": np.array([0.0, 10.0, 20.0, 30.0]),
        "admitted_s": np.array([1.0, 10.0, NAN, 32.0]),
        "first_token_s": np.array([4.0, 11.0, NAN, 36.0]),
        "finish_s": np.array([8.0, 11.0, NAN, 37.0]),
        "prompt_tokens": np.array([100, 200, 999, 300]),
        "cached_tokens": np.array([0, 50, 999, 100]),
        "output_tokens": np.array([5, 1, 7, 3]),
        "preemptions": np.array([0, 0, 0, 2]),
        "status": np.array(["finished", "finished", "rejected", "finished"]),
        "prefix_s": np.array([0.0, 0.0, NAN, 1.0]),
        **{f"{cause}_s": np.zeros(4) for cause in ("pcie", "nvlink", "cpu", "handoff", "overhead")},
        **{f"ttft_{cause}_s": np.zeros(4) for cause in ("pcie", "nvlink", "cpu", "swap", "handoff", "overhead")},
        "ttft_compute_s": np.array([2.0, 1.0, NAN, 3.0]),
        "ttft_hbm_s": np.array([1.0, 0.0, NAN, 0.0]),
        "compute_s": np.array([3.0, 1.0, NAN, 3.0]),
        "hbm_s": np.array([4.0, 0.0, NAN, 0.5]),
        "swap_s": np.array([0.0, 0.0, NAN, 0.5]),
    },
    "token_gaps": (np.array([0.5, 1.0]), np.array([2, 4])),
    "makespan_s": 50.0,
}


def test_figures_by_hand(make_result: Make) -> None:
    summary = summarize(make_result(**BY_HAND))
    assert summary["requests"] == {"submitted": 4, "finished": 3, "rejected": 1, "timed_out": 0}
    assert summary["tokens"] == {"prompt": 600, "output": 9, "prompt_cached": 150}  # without the rejected request's
    assert summary["output_tokens_per_s"] == 9 / 50
    assert summary["goodput_rps"] == 3 / 50
    assert summary["ttft_s"] == {"mean": 11 / 3, "p50": 4, "p90": 6, "p99": 6, "max": 6}  # of 1, 4, 6
    assert summary["tpot_s"] == {"mean": 0.75, "p50": 0.5, "p90": 1, "p99": 1, "max": 1}  # 4 s / 4 and 1 s / 2
    assert summary["e2e_s"]["max"] == 8
    assert summary["queue_s"] == {"mean": 1, "p50": 1, "p90": 2, "p99": 2, "max": 2}  # of 0, 1, 2
    assert summary["itl_s"] == {"mean": 5 / 6, "p50": 1, "p90": 1, "p99": 1, "max": 1}  # the third of six gaps is 1


def test_preemptions_by_hand(make_result: Make) -> None:
    """The fourth request made room twice: once it came back from DDR, once it computed its 300 tokens anew."""
    summary = summarize(make_result(**BY_HAND, recomputed={"count": 1, "tokens": 300}))
    assert summary["preemptions"] == {"count": 2, "by_swap": 1, "by_recomputation": 1, "recomputed_tokens": 300}


def test_attribution_by_hand(make_result: Make) -> None:
    summary = summarize(make_result(**BY_HAND))
    found = {
        phase: {figure: {cause: x for cause, x in values.items() if x} for figure, values in figures.items()}
        for phase, figures in summary["attribution"].items()
    }
    # Latencies of 8, 1 and 7 s; of the first, 1 s in the queue, 3 s of arithmetic, 4 s of the HBM, and so on.
    assert found["e2e"]["mean_s"] == pytest.approx(
        {"queue": 1.0, "prefix": 1 / 3, "compute": 7 / 3, "hbm": 1.5, "swap": 0.5 / 3}
    )
    assert found["e2e"]["mean_share"] == pytest.approx(
        {
            "queue": (1 / 8 + 0 + 2 / 7) / 3,
            "prefix": (0 + 0 + 1 / 7) / 3,
            "compute": (3 / 8 + 1 + 3 / 7) / 3,
            "hbm": (4 / 8 + 0 + 0.5 / 7) / 3,
            "swap": (0 + 0 + 0.5 / 7) / 3,
        }
    )
    assert found["ttft"]["mean_s"] == pytest.approx({"queue": 1.0, "prefix": 1 / 3, "compute": 2.0, "hbm": 1 / 3})
    # The second has one token and no decode; the others took 4 and 1 s.
    assert found["decode"]["mean_share"] == pytest.approx({"compute": 1 / 8, "hbm": (3 / 4 + 0.5) / 2, "swap": 0.25})
    assert summary["bottleneck"] == "compute"
    sums = {phase: sum(values["mean_s"].values()) for phase, values in found.items()}
    assert sums["e2e"] == pytest.approx(summary["e2e_s"]["mean"])
    assert sums["ttft"] == pytest.approx(summary["ttft_s"]["mean"])
    nobody = summarize(make_result(**BY_HAND), warmup_s=1000.0)
    assert nobody["bottleneck"] is None
    assert set(nobody["attribution"]["e2e"]["mean_s"].values()) == {None}


def test_tenants_are_summarized_alike_and_in_order(make_result: Make) -> None:
    tenants = summarize(make_result(**BY_HAND))["tenants"]
    assert list(tenants) == ["a", "b"]
    assert tenants["a"]["requests"] == {"submitted": 3, "finished": 2, "rejected": 1, "timed_out": 0}
    assert tenants["b"]["tokens"] == {"prompt": 100, "output": 5, "prompt_cached": 0}
    assert tenants["a"]["ttft_s"]["max"] == 6
    assert tenants["a"]["goodput_rps"] == 2 / 50
    assert set(tenants["a"]["itl_s"].values()) == {None}  # this result says of no gap whose it was
    alone = summarize(make_result(tenants=("only",)))
    shared = set(alone["tenants"]["only"]) - OF_TENANTS
    assert {key: alone["tenants"]["only"][key] for key in shared} == {key: alone[key] for key in shared}
    service = alone["tokens"]["prompt"] - alone["tokens"]["prompt_cached"] + 2 * alone["tokens"]["output"]
    assert alone["tenants"]["only"]["service"] == service
    assert alone["fairness"] == {"jain_index": 1.0, "contended_jain_index": None}


def test_a_tenants_goodput_counts_the_bounds_of_its_class(make_result: Make) -> None:
    terms = {"a": Tenant(slo_class="slow", weight=2), "b": Tenant(slo_class="fast")}
    tenancy = Tenancy(terms=terms, slo_classes={"slow": {"ttft_s": 6}, "fast": {"ttft_s": 3.9, "tpot_s": 9}})
    summary = summarize(make_result(**BY_HAND, tenancy=tenancy), {"ttft_s": 0.5})
    # TTFTs are 4 for `b`, 1 and 6 for `a`; the bound that holds without a class would let nobody pass.
    assert summary["tenants"]["a"]["goodput_rps"] == summary["goodput_rps"] == 2 / 50
    assert summary["tenants"]["b"]["goodput_rps"] == 0
    assert [summary["tenants"][x]["slo_class"] for x in "ab"] == ["slow", "fast"]
    assert summary["tenants"]["b"]["slo"] == {"ttft_s": 3.9, "tpot_s": 9}
    service = {"a": (200 - 50) + (300 - 100) + 2 * (1 + 3), "b": 100 + 2 * 5}
    assert {x: summary["tenants"][x]["service"] for x in "ab"} == service
    assert summary["tenants"]["a"]["weighted_service"] == service["a"] / 2
    terms["a"] = Tenant()
    assert summarize(make_result(**BY_HAND, tenancy=tenancy), {"ttft_s": 5})["tenants"]["a"]["goodput_rps"] == 1 / 50


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ({"ttft_s": 4}, 2),  # 4 and 1 are within, 6 is not
        ({"tpot_s": 0.6}, 2),  # 1 is not within, 0.5 is, and one output token has no TPOT to exceed
        ({"ttft_s": 4, "tpot_s": 0.6}, 1),
        ({"queue_s": 2, "e2e_s": 8}, 3),  # a bound may be met exactly
    ],
)
def test_goodput_counts_requests_within_all_bounds(make_result: Make, slo: dict[str, float], good: int) -> None:
    assert summarize(make_result(**BY_HAND), slo)["goodput_rps"] == good / 50


def test_warmup_leaves_early_requests_out_of_the_latencies_only(make_result: Make) -> None:
    cold, warm = summarize(make_result(**BY_HAND)), summarize(make_result(**BY_HAND), warmup_s=10.0)
    assert warm["ttft_s"] == {"mean": 3.5, "p50": 1, "p90": 6, "p99": 6, "max": 6}  # the request at 0 s is out
    differing = {key for key in cold if cold[key] != warm[key]}
    latencies = {"ttft_s", "tpot_s", "e2e_s", "queue_s", "tenants", "attribution", "bottleneck"}
    assert differing <= {*latencies, "run_id"}  # an id of what came out


def test_statistics_of_nothing_are_null(make_result: Make) -> None:
    result = make_result(**BY_HAND)
    nothing = result.requests | {"status": np.full(4, "unfinished")}
    empty = {"requests": nothing, "token_gaps": (np.empty(0), np.empty(0, np.int64)), "makespan_s": 0.0, "busy": {}}
    summary = summarize(make_result(**(BY_HAND | empty)))
    for latency in ("ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s"):
        assert summary[latency] == dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    assert summary["goodput_rps"] is None  # per second of no time
    assert summary["bottleneck"] is None
    json.dumps(summary, allow_nan=False)
    no_rows = {name: values[:0] for name, values in result.requests.items()}
    assert summarize(make_result(**(BY_HAND | {"requests": no_rows})))["tenants"] == {}


def test_the_keys_are_the_contract(make_result: Make) -> None:
    group = [
        "requests",
        "tokens",
        "output_tokens_per_s",
        "goodput_rps",
        "slo_attainment",
        "ttft_s",
        "tpot_s",
        "itl_s",
        "e2e_s",
        "queue_s",
        "attribution",
    ]
    rest = [
        "makespan_s",
        "fairness",
        "tenants",
        "memory",
        "links",
        "traffic",
        "cache",
        "swaps",
        "preemptions",
        "session_kv",
        "busy",
        "bottleneck",
        "uncertainty",
        "warnings",
    ]
    clocks = ["wall_s", "cpu_s", "setup_cpu_s"]
    summary = summarize(make_result(tenants=("x", "y")))
    identity = ["run_id", "inputs_sha256", "version"]
    assert sorted(summary) == sorted(["schema_version", *identity, "partial", "inputs", *group, *rest, *clocks])
    assert list(summary)[-3:] == clocks  # one block, which alone differs between runs of the same inputs
    assert set(summary["tenants"]["x"]) == {*group, *OF_TENANTS}
    assert sorted(summary["attribution"]) == ["decode", "e2e", "ttft"]
    assert json.loads(json.dumps(summary)) == summary  # plain values all through


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=30))
def test_percentiles_are_nearest_ranks_of_the_expanded_sample(weighted: list[tuple[int, int]]) -> None:
    sample = sorted(value for value, count in weighted for _ in range(count))
    values, counts = np.array([v for v, _ in weighted], float), np.array([c for _, c in weighted], int)
    found = statistics(values, counts)
    if not sample:
        assert set(found.values()) == {None}
        return
    for percent in (50, 90, 99):
        # The definition: the smallest value that at least this share of the sample does not exceed.
        wanted = next(v for v in sample if sum(x <= v for x in sample) * 100 >= percent * len(sample))
        assert found[f"p{percent}"] == wanted
    assert found["mean"] == pytest.approx(sum(sample) / len(sample))
    assert found["max"] == sample[-1]


def test_latencies_keep_one_row_per_request(make_result: Make) -> None:
    times = latencies(make_result(**BY_HAND))
    np.testing.assert_array_equal(times["ttft_s"], [4, 1, NAN, 6])
    np.testing.assert_array_equal(times["tpot_s"], [1, NAN, NAN, 0.5])


def test_plain_values_are_what_json_takes() -> None:
    given_values = {"a": np.int64(3), "b": [np.array([1.5, NAN])], 4: (math.inf, True, None), "c": np.str_("x")}
    assert plain(given_values) == {"a": 3, "b": [[1.5, None]], "4": [None, True, None], "c": "x"}


@pytest.mark.parametrize(
    ("slo", "warmup_s", "message"),
    [
        ({"tfft_s": 1.0}, 0.0, "unknown SLO bound 'tfft_s'; did you mean 'ttft_s'? known: ttft_s, tpot_s"),
        ({"ttft_s": 0.0}, 0.0, "the SLO bound ttft_s=0 must be greater than 0 seconds"),
        ({"ttft_s": NAN}, 0.0, "the SLO bound ttft_s=nan must be greater than 0 seconds"),
        ({}, -1.0, "warmup_s=-1 must be a finite number of seconds >= 0"),
    ],
)
def test_bad_bounds_are_refused(make_result: Make, slo: dict[str, float], warmup_s: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        summarize(make_result(), slo, warmup_s)
