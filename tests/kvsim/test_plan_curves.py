"""How plans fare at other loads: each point is a plain simulation, and page and notebook draw what the document has."""

from itertools import pairwise
from typing import Any

import pytest
from page_reader import Document

import traces
from kvsim import Plan, Setup, default_host, load_gpu, load_host, load_model, plan, simulate, summarize
from kvsim.report.plan import plan_page
from policies import parse_policy
from traces import Trace

MODEL, SLO = "llama-3.1-8b", {"ttft_p99": 1.0, "tpot_p99": 0.03}
LOADS = [1.05**step for step in (-14, -6, 0, 2, 4)]


@pytest.fixture(scope="module")
def chat() -> Trace:
    return traces.load("azure-2023-conv", limit=200).scaled_rate(40)


@pytest.fixture(scope="module")
def found() -> Plan:
    slo = ",".join(f"{name}={limit_s}s" for name, limit_s in SLO.items())
    asked: dict[str, Any] = {"trace": "azure-2023-conv", "limit": 200, "rate_scale": 40.0, "pools": False, "tp": 1}
    return plan(model=MODEL, gpu=["h100-sxm", "a100-80g-sxm"], policy=["full", "shadowkv"], slo=slo, **asked)


def test_points_are_plain_simulations_of_the_fleet_at_that_load(found: Plan, chat: Trace) -> None:
    assert found.answer is not None
    own = [row for row in found.plans if row["gpu"] == found.answer["gpu"]]
    assert {row["policy"] for row in own} == {"full", "shadowkv"}
    for row in own:
        curve = row["curve"]
        assert {one["rate_scale"] for one in curve} >= set(LOADS)
        assert all(one["rate_scale"] < two["rate_scale"] for one, two in pairwise(curve))
        gpu = load_gpu(row["gpu"])
        fleet = Setup(
            model=load_model(MODEL),
            policy=parse_policy(row["policy"]),
            gpu=gpu,
            host=load_host(default_host(gpu.name)),
            gpus=row["gpus"],
        )
        span_s = chat.arrival_s[-1] - chat.arrival_s[0]
        for point in curve[:: len(curve) - 1]:  # the lightest load and the heaviest
            summary = summarize(simulate(chat.scaled_rate(point["rate_scale"]), fleet))
            assert point["slo"] == {f"{name}_p99": summary[f"{name}_s"]["p99"] for name in ("ttft", "tpot")}
            assert point["offered_rps"] == pytest.approx(len(chat) / span_s * point["rate_scale"])
            assert point["holds"] == all(point["slo"][name] <= limit_s for name, limit_s in SLO.items())


def test_other_gpus_are_not_played_at_other_loads(found: Plan) -> None:
    assert found.answer is not None
    others = [row for row in found.plans if row["gpu"] != found.answer["gpu"]]
    assert [[one["rate_scale"] for one in row["curve"]] for row in others] == [[1.0]] * len(others)


def test_the_page_draws_a_line_for_each_policy_with_the_limit(found: Plan) -> None:
    document = found.to_dict()
    own = [row for row in found.plans if len(row["curve"]) > 1]
    figures = Document(plan_page(document, "kvsim plan")).figures
    drawn = [one for one in figures if one["layout"]["xaxis"]["title"]["text"] == "offered requests/s"]
    goodput, first_token, _ = drawn
    for line, row in zip(goodput["data"], own, strict=True):
        assert line["y"] == pytest.approx([one["goodput_rps"] for one in row["curve"]], rel=1e-5)
    unit_s = 1.0 if "(s)" in first_token["layout"]["yaxis"]["title"]["text"] else 1e-3
    for line, row in zip(first_token["data"], own, strict=True):
        known = [one for one in row["curve"] if one["slo"]["ttft_p99"] is not None]
        assert line["x"] == pytest.approx([one["offered_rps"] for one in known], rel=1e-5)
        assert line["y"] == pytest.approx([one["slo"]["ttft_p99"] / unit_s for one in known], rel=1e-5)
        assert line["marker"]["symbol"] == ["circle" if one["slo"]["ttft_p99"] <= 1 else "circle-open" for one in known]
    assert first_token["layout"]["shapes"][0]["y0"] == pytest.approx(1 / unit_s)


def test_a_notebook_draws_the_same(found: Plan) -> None:
    by_load = found.plot_load("tpot_p99")
    assert by_load.layout.title.text == "tpot_p99 by offered load"
    own = [row for row in found.plans if len(row["curve"]) > 1]
    for line, row in zip(by_load.data, own, strict=True):
        assert list(line.y) == pytest.approx([1000 * one["slo"]["tpot_p99"] for one in row["curve"]], rel=1e-5)
    with pytest.raises(ValueError, match="objective 'e2e_p99' is none of this plan"):
        found.plot_load("e2e_p99")
