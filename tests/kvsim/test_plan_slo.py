"""Objectives as people write them, and the statistics that they bound."""

import re

import numpy as np
import pytest

import traces
from kvsim import Setup, Tenant, latencies, load_gpu, load_host, load_model, simulate, summarize
from kvsim.planning.slo import NAMES, Objective, members, parse_slo, request_bounds, samples
from policies import Full


def test_objectives_are_read_with_their_units() -> None:
    assert parse_slo("ttft_p99=30s,tpot_mean=100ms") == (
        Objective("ttft_s", "p99", 30.0),
        Objective("tpot_s", "mean", 0.1),
    )


def test_a_class_holds_up_to_the_end_of_its_text_or_up_to_the_next() -> None:
    found = parse_slo(["e2e_max=1m", "chat:ttft_p99=2s,tpot_p50=50ms,batch:e2e_p90=1h"])
    assert [one.name for one in found] == ["e2e_max", "chat:ttft_p99", "chat:tpot_p50", "batch:e2e_p90"]
    assert request_bounds(found, "chat") == {"ttft_s": 2.0, "tpot_s": 0.05}


def test_the_loosest_bound_of_a_latency_is_a_request_s() -> None:
    assert request_bounds(parse_slo("ttft_p50=1s,ttft_p99=4s"), None) == {"ttft_s": 4.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ttft=3s", "ttft_p99"),
        ("ttft_p98=3s", "did you mean 'ttft_p9"),
        ("ttft_p99", "must be written NAME=TIME"),
        ("ttft_p99=0s", "above 0"),
        ("ttft_p99=-1s", "duration '-1s'"),
        ("ttft_p99=3", None),
        ("ttft_p99=3 parsecs", "unknown unit"),
        ("ttft_p99=1s,ttft_p99=2s", "twice"),
        (":ttft_p99=1s", "names no class"),
        ("", "must be written NAME=TIME"),
    ],
)
def test_what_cannot_be_meant_is_said(text: str, words: str | None) -> None:
    if words is None:
        assert parse_slo(text)[0].limit_s == 3.0
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_slo(text)


def test_values_are_those_of_the_summary() -> None:
    trace = traces.load("azure-2023-code", limit=60)
    setup = Setup(
        model=load_model("llama-3.1-8b"), policy=Full(), gpu=load_gpu("h100-sxm"), host=load_host("ddr5-dual-xeon")
    )
    result = simulate(trace, setup)
    summary = summarize(result)
    for name in NAMES:
        latency, _, statistic = name.rpartition("_")
        (one,) = parse_slo(f"{name}=1s")
        value_s = one.of(samples(result, [one], {}, trace.tenants, 0.0)[name])
        if statistic == "p95":
            values = latencies(result)[f"{latency}_s"]
            values = np.sort(values[~np.isnan(values)])
            assert (values <= value_s).mean() >= 0.95 > (values < value_s).mean()
        else:
            assert value_s == summary[f"{latency}_s"][statistic]


def test_a_class_is_that_of_tenants_or_else_a_tenant_s_name() -> None:
    objectives = parse_slo("chat:ttft_p99=1s,b*:ttft_p99=9s")
    names = ["alice", "bob", "bulk"]
    assert members({"alice": Tenant(slo_class="chat")}, names, objectives) == {"chat": [0], "b*": [1, 2]}
    with pytest.raises(ValueError, match="class or tenant of --slo 'chat'"):
        members({}, names, objectives)
