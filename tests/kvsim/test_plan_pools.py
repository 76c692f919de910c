"""Pools for prompts and for decoding: replicas go to the one that lags, and a plan that has pools holds by them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvsim import load_scenario, plan, simulate, summarize
from kvsim.planning.candidates import candidates
from kvsim.planning.measured import Ask, Measured
from kvsim.planning.planner import Planner
from kvsim.planning.prices import Prices
from kvsim.planning.simulations import Key, Simulations
from kvsim.planning.slo import parse_slo

OBJECTIVES = parse_slo("ttft_p99=1s,tpot_p99=100ms")


def measured(ttft_s: float, tpot_s: float) -> Measured:
    return Measured(
        values_s={"ttft_p99": ttft_s, "tpot_p99": tpot_s},
        samples_s={},
        submitted=1,
        finished=1,
        good_rps=1.0,
        output_tokens_per_s=1.0,
        prompt_tokens=1,
        cached_tokens=0,
        makespan_s=1.0,
        bottleneck="hbm",
    )


@pytest.fixture
def planner() -> Planner:
    scenario = load_scenario(
        {"trace": "azure-2023-code", "limit": 5, "model": "llama-3.1-8b", "gpu": "h100-sxm", "tp": 1}
    )
    trace = scenario.load_trace()
    families = candidates(scenario, ["h100-sxm"], Prices(), trace, {}).families[:1]
    families.append(replace(families[0], prefill_share=0.5))
    simulations = Simulations(families, [trace], Ask(objectives=OBJECTIVES, of_class={}, bounds={}, warmup_s=0.0))
    return Planner(simulations, [trace], OBJECTIVES, 64, None, True, 0)


def served(planner: Planner, replicas: int, prompts_s: float, tokens_s: float) -> tuple[float, list[int]]:
    """What comes of so many replicas whose pools take these seconds, shared by their replicas; the splits tried."""
    task, tried = planner.served_best(1, replicas), []
    key: Any = next(task)
    while True:
        assert isinstance(key, Key)
        tried.append(key.prompts)
        try:
            key = task.send(measured(prompts_s / key.prompts, tokens_s / (replicas - key.prompts)))
        except StopIteration as end:
            return end.value, tried


@pytest.mark.parametrize("prompts", [2, 3, 4, 5, 6])
def test_the_split_that_holds_is_found_from_the_share_of_work(planner: Planner, prompts: int) -> None:
    """Eight replicas, of which just so many prompts need, and the others decoding."""
    ratio, tried = served(planner, 8, 0.999 * prompts, 0.0999 * (8 - prompts))
    assert ratio <= 1
    assert tried[-1] == prompts == planner.found.prompts[1, 8]
    assert tried[0] == 4
    assert len(tried) == 1 + abs(prompts - 4)


def test_where_both_pools_lag_the_nearest_split_is_kept(planner: Planner) -> None:
    ratio, tried = served(planner, 8, 6.0, 0.4)  # six replicas for prompts and four for decoding would do
    assert ratio > 1
    assert len(tried) == len(set(tried)) <= 3
    best = planner.found.prompts[1, 8]
    assert ratio == pytest.approx(max(6.0 / best, 4.0 / (8 - best)))


def test_two_replicas_have_one_split(planner: Planner) -> None:
    assert served(planner, 2, 0.5, 0.01)[1] == [1]
    assert served(planner, 2, 5.0, 0.01)[1] == [1]


def test_a_plan_with_pools_holds_by_them() -> None:
    """Long prompts before short outputs: a chunk of a prompt delays every token of who decodes beside it."""
    words = "synthetic:rate=4,prompt=fixed:16000,output=fixed:200,span_s=40"
    found = plan(trace=words, seeds=1, model="llama-3.1-8b", gpu="h100-sxm", slo="ttft_p99=8s,tpot_p99=20ms", tp=1)
    answer = found.answer
    assert answer is not None
    assert 0 < answer["prefill_gpus"] < answer["gpus"]
    scenario = load_scenario({"trace": words, "model": "llama-3.1-8b", "gpu": "h100-sxm", "gpus": answer["gpus"]})
    (fleet,) = scenario.setups()
    apart = replace(fleet, prefill_gpus=answer["prefill_gpus"])
    cached: dict[str, Any] = {"prefix_cache_ddr_bytes": 1 << 40, "router": "kv-aware"} if answer["options"] else {}
    trace = scenario.load_trace()
    summary = summarize(simulate(trace, replace(apart, **cached)))
    assert summary["tpot_s"]["p99"] == answer["slo"]["tpot_p99"]["value_s"] <= 0.02
    assert summary["ttft_s"]["p99"] == answer["slo"]["ttft_p99"]["value_s"] <= 8
    together = summarize(simulate(trace, replace(fleet, **cached)))
    assert together["tpot_s"]["p99"] > 0.02 or together["ttft_s"]["p99"] > 8
    assert np.isfinite(answer["cost_per_million_tokens"])
