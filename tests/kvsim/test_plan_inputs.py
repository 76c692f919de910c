"""What a plan reads beside the trace: prices, measured quality, candidates, and closed forms for a start."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import traces
from kvsim import load_scenario, simulate, summarize
from kvsim.planning.candidates import candidates
from kvsim.planning.closed_form import replicas_needed, work_of
from kvsim.planning.measured import Ask, Measured
from kvsim.planning.prices import Prices
from kvsim.planning.quality import NOT_MEASURED, Qualities, loss_nats
from kvsim.planning.simulations import Failed, Key, Simulations
from kvsim.planning.simulations import one as single
from kvsim.planning.slo import parse_slo
from kvsim.planning.sources import kind_of
from kvsim.results.intervals import t_interval

ROOT = Path(__file__).parents[2]


def asked(**options: Any) -> Any:
    given = {"trace": "mooncake-conversation", "limit": 50, "model": "llama-3.1-8b", "gpu": "h100-sxm", **options}
    return load_scenario(given)


def test_every_price_has_a_source_and_a_date_and_every_figure_is_above_0() -> None:
    prices = Prices()
    for gpu in ("a100-80g-sxm", "h100-sxm", "h200-sxm", "l40s", "rtx-4090", "b200"):
        price = prices.of(gpu)
        assert price.usd_per_hour > 0
        assert price.price_source
        assert price.price_date.startswith("20")
        assert price.watts is None or price.watts_source


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h100-sxm: {usd_per_hour: 0, price_source: x, price_date: 2026-01}", "usd_per_hour=0"),
        ("h100-sxm: {usd_per_hour: 1, price_date: 2026-01}", "price_source is missing"),
        ("h100-sxm: {usd_per_hour: 1, price_source: x, price_date: today}", "price_date='today'"),
        ("h100-sxm: {usd_per_hour: 1, price_source: x, price_date: 2026-01, watt: 3}", "did you mean 'watts'"),
        ("h100-sxm: {usd_per_hour: 1, price_source: x, price_date: 2026-01, watts: -3}", "watts=-3"),
        ("- 1", "holds no mapping"),
    ],
)
def test_a_file_of_prices_is_read_strictly(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        Prices(file)


def test_the_shipped_quality_is_condensed_from_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/real_text.json").read_text())["rows"]
    shipped = json.loads((ROOT / "kvsim/catalogue/quality.json").read_text())["rows"]
    assert [(row["policy"], row["context_tokens"]) for row in shipped] == [
        (row["policy"], row["context_tokens"]) for row in measured
    ]
    for one, other in zip(shipped, measured, strict=True):
        values = [value for text in other["kl_nats"].values() for value in text]
        assert one["kl_nats"] == t_interval(values)._asdict()


def test_quality_is_that_of_the_policy_s_own_parameters_at_the_nearest_context() -> None:
    found = Qualities()
    quest = found.of("quest:budget_tokens=768", 6000)
    assert isinstance(quest, dict)
    assert (quest["policy"], quest["context_tokens"]) == ("quest:budget_tokens=768", 6144)
    near = found.of("shadowkv", 8000)  # 2,048 tokens, measured with 2,032
    assert isinstance(near, dict)
    assert near["policy"] == "shadowkv:budget_tokens=2032"
    assert found.of("quest:budget_tokens=896", 6000) == NOT_MEASURED
    assert found.of("locret", 6000) == NOT_MEASURED
    assert loss_nats(NOT_MEASURED) is None
    assert loss_nats(found.of("full", 1)) == 0


def test_a_file_of_the_user_s_stands_in(tmp_path: Path) -> None:
    interval = {"mean": 0.25, "low": 0.2, "high": 0.3}
    row = {"policy": "retroinfer", "context_tokens": 4096, "kl_nats": interval, "top1_share": interval}
    file = tmp_path / "quality.json"
    file.write_text(json.dumps({"kind": "quality", "model": "mine", "text": {"name": "t.txt"}, "rows": [row]}))
    found = Qualities(file).of("retroinfer", 9)
    assert isinstance(found, dict)
    assert (found["kl_nats"], found["kl_nats_low"], found["kl_nats_high"]) == (0.25, 0.2, 0.3)
    assert "mine, t.txt" in found["source"]
    file.write_text(json.dumps({"rows": [{"policy": "full"}]}))
    with pytest.raises(ValueError, match="no file of kvsim quality --save"):
        Qualities(file)


def test_splits_are_powers_of_two_that_hold_the_longest_request() -> None:
    scenario = asked(model="llama-3.1-70b", limit=None)
    found = candidates(scenario, ["h100-sxm", "h200-sxm"], Prices(), scenario.load_trace(), {})
    plain = [one for one in found.families if not one.options]
    assert [(one.gpu, one.setup.tp) for one in plain] == [
        ("h100-sxm", 4),
        ("h100-sxm", 8),
        ("h200-sxm", 2),
        ("h200-sxm", 4),
        ("h200-sxm", 8),
    ]
    assert {(one.gpu, one.tp) for one in found.misfits} == {("h100-sxm", 1), ("h100-sxm", 2), ("h200-sxm", 1)}
    assert all(one.reason for one in found.misfits)


def test_stages_are_for_what_no_host_holds() -> None:
    scenario = asked(model="llama-3.1-405b", gpu="a100-80g-sxm")
    found = candidates(scenario, ["a100-80g-sxm"], Prices(), scenario.load_trace(), {})
    plain = [(one.setup.tp, one.setup.pp) for one in found.families if not one.options]
    assert plain == [(8, 2)]


def test_a_cache_that_was_asked_for_is_the_only_one() -> None:
    def options(**given: Any) -> set[tuple[str, ...]]:
        scenario = asked(**given)
        return {one.options for one in candidates(scenario, ["h100-sxm"], Prices(), scenario.load_trace(), {}).families}

    cached = ("--prefix-cache-ddr", "1TiB", "--router", "kv-aware")
    assert options() == {(), cached}
    assert options(prefix_cache_ddr="1GiB") == {()}
    assert options(policy="shadowkv") == {()}
    assert options(trace="azure-2023-code") == {()}
    assert options(router="least-loaded") == {(), cached[:2]}


def test_replicas_of_pools_are_shared_out_by_work() -> None:
    scenario = asked(tp=2)
    (family, *_) = candidates(scenario, ["h100-sxm"], Prices(), scenario.load_trace(), {}).families
    pooled = replace(family, prefill_share=0.7)
    assert [pooled.prefill_replicas(n) for n in (2, 3, 10)] == [1, 2, 7]
    assert pooled.fleet(10).prefill_gpus == 14
    assert pooled.fleet(10, prompts=8).prefill_gpus == 16
    assert family.fleet(3).prefill_gpus == 0


def test_the_closed_form_prices_a_lone_prompt_as_the_simulator_does() -> None:
    trace = traces.load("azure-2023-code", limit=40).scaled_rate(0.001)  # nobody waits
    scenario = load_scenario({"trace": "azure-2023-code", "model": "llama-3.1-8b", "gpu": "h100-sxm"})
    (family, *_) = candidates(scenario, ["h100-sxm"], Prices(), trace, {}).families
    work = work_of(family, trace)
    summary = summarize(simulate(trace, family.setup))
    (ttft,) = parse_slo("ttft_p50=1s")
    assert work.floor_s(ttft) == pytest.approx(summary["ttft_s"]["p50"], rel=0.1)
    assert work.value_s(ttft, 1) == pytest.approx(work.floor_s(ttft))


def test_estimates_fall_as_replicas_are_added() -> None:
    scenario = asked(limit=400)
    trace = scenario.load_trace().scaled_rate(5)
    (family, *_) = candidates(scenario, ["h100-sxm"], Prices(), trace, {}).families
    work = work_of(family, trace)
    objectives = parse_slo("ttft_p90=5s,tpot_p90=40ms,e2e_p99=2m")
    for one in objectives:
        values = [work.value_s(one, n) for n in (1, 2, 4, 8, 64)]
        assert values == sorted(values, reverse=True)
    need = replicas_needed(work, objectives, 512)
    assert all(work.value_s(one, need) <= one.limit_s for one in objectives)
    assert need == 1 or any(work.value_s(one, need - 1) > one.limit_s for one in objectives)
    assert np.isfinite(need)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("Measured on one H200 (driver 580)", "measured"),
        ("The same chip with other memory. Measured on one H200", "assumed"),
        ("NVIDIA H100 datasheet (2023)", "datasheet"),
        ("All-reduce and GEMMs: fitted by a script to kernels, measured by NVIDIA; an estimated start", "fitted"),
        ("Estimate: back-to-back kernels", "assumed"),
        ("who knows", "assumed"),
    ],
)
def test_a_source_says_what_it_is(source: str, kind: str) -> None:
    assert kind_of(source) == kind


def killed(*_: object) -> None:
    """Stands in for a simulation whose process the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_costs_its_simulation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = asked(tp=1)
    trace = scenario.load_trace()
    objectives = parse_slo("ttft_p50=1h")
    found = candidates(scenario, ["h100-sxm"], Prices(), trace, {})
    ask = Ask(objectives=objectives, of_class={}, bounds={}, warmup_s=0.0)
    with Simulations(found.families, [trace], ask) as simulations:
        monkeypatch.setattr("kvsim.planning.simulations.measure", killed)
        (lost,) = simulations.all([single(Key(0, 1))])
        monkeypatch.undo()
        (kept,) = simulations.all([single(Key(0, 2))])
    assert isinstance(lost, Failed)
    assert "killed" in lost.reason
    assert isinstance(kept, Measured)
    assert simulations.made == 2
