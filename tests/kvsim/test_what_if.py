"""What becomes of a plan where things turn out otherwise: each row is a plain simulation, or an exact product."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_reader import Document

import traces
from kvsim import Plan, Setup, default_host, load_gpu, load_host, load_model, plan, simulate, summarize
from kvsim.hardware.slower_link import slower_host, slower_link
from kvsim.planning.changes import forgetful
from kvsim.planning.what_if import price_row
from kvsim.report.plan import plan_page
from policies import parse_policy
from traces import Trace

MODEL = "llama-3.1-8b"
SLO = {"ttft_s": 2.0, "tpot_s": 0.05}
ASKED: dict[str, Any] = {"model": MODEL, "gpu": "l40s", "slo": "ttft_p99=2s,tpot_p99=50ms", "pools": False, "tp": 1}


@pytest.fixture(scope="module")
def chat() -> Trace:
    return traces.load("azure-2023-code", limit=200)


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(trace="azure-2023-code", limit=200, policy="retroinfer", **ASKED)


def rows(found: Plan) -> dict[str, dict[str, Any]]:
    return {row["change"]: row for row in found.to_dict()["sensitivity"]}


def fleet(found: Plan, gpus: int, **options: Any) -> Setup:
    assert found.answer is not None
    gpu, policy = load_gpu("l40s"), parse_policy(found.answer["policy"])
    given: dict[str, Any] = {"gpu": gpu, "host": load_host(default_host(gpu.name)), "policy": policy, **options}
    return Setup(model=load_model(MODEL), gpus=gpus, **given)


def values_s(trace: Trace, setup: Setup) -> dict[str, float]:
    summary = summarize(simulate(trace, setup))
    return {f"{name.removesuffix('_s')}_p99": summary[name]["p99"] for name in SLO}


def longer(trace: Trace) -> Trace:
    return replace(trace, prompt_tokens=2 * trace.prompt_tokens)


def test_each_change_is_a_plain_simulation_of_the_plans_fleet(found: Plan, chat: Trace) -> None:
    assert found.answer is not None
    gpus, gpu = found.answer["gpus"], load_gpu("l40s")
    host = load_host(default_host(gpu.name))
    links: dict[str, Any] = {"gpu": slower_link(gpu, 0.5), "host": slower_host(host, 0.5)}
    for name, trace, setup in (
        ("hit rate 40 %", chat, fleet(found, gpus, counts={"miss": 0.6})),
        ("link half as fast", chat, fleet(found, gpus, **links)),
        ("prompts twice as long", longer(chat), fleet(found, gpus)),
    ):
        row = rows(found)[name]
        assert row["method"] == "simulated"
        assert row["gpus"] == gpus
        assert row["slo"] == values_s(trace, setup)
        assert row["holds"] == (row["slo"]["ttft_p99"] <= 2 and row["slo"]["tpot_p99"] <= 0.05)
    assert values_s(chat, fleet(found, gpus))["tpot_p99"] < rows(found)["hit rate 40 %"]["slo"]["tpot_p99"]


def test_what_breaks_is_sized_anew_to_the_last_replica(found: Plan, chat: Trace) -> None:
    assert found.answer is not None
    row = rows(found)["prompts twice as long"]
    needed = row["needed"]
    assert not row["holds"]
    assert needed["gpus"] > found.answer["gpus"]
    assert needed["slo"] == values_s(longer(chat), fleet(found, needed["gpus"]))
    assert needed["slo"]["ttft_p99"] <= 2
    fewer = values_s(longer(chat), fleet(found, needed["gpus"] - 1))
    assert fewer["ttft_p99"] > 2 or fewer["tpot_p99"] > 0.05
    tokens_per_s = summarize(simulate(longer(chat), fleet(found, needed["gpus"])))["output_tokens_per_s"]
    price = found.answer["usd_per_hour"] / found.answer["gpus"]
    assert needed["cost_per_million_tokens"] == pytest.approx(needed["gpus"] * price / 3600 / tokens_per_s * 1e6)


def test_a_dearer_gpu_costs_as_much_more_and_names_what_is_cheaper_then(found: Plan) -> None:
    answer = found.answer
    assert answer is not None
    row = rows(found)["price +50 %"]
    assert row["method"] == "scaled"
    assert row["cost_per_million_tokens"] == pytest.approx(1.5 * answer["cost_per_million_tokens"])
    assert (row["needed"]["gpus"], row["instead"]) == (answer["gpus"], None)
    other = {**answer, "gpu": "other", "replicas": 1}
    dear, cheap = (other | {"usd_per_hour": share * answer["usd_per_hour"]} for share in (1.6, 1.4))
    assert price_row(answer, [answer, dear])["instead"] is None
    assert price_row(answer, [answer, dear, cheap])["instead"]["usd_per_hour"] == cheap["usd_per_hour"]


def test_a_fixed_size_is_not_sized_anew_and_what_caches_nothing_is_not_simulated() -> None:
    found = plan(trace="azure-2023-code", limit=200, policy="full", gpus=4, **{**ASKED, "slo": "ttft_p99=2s"})
    assert found.answer is not None
    assert not rows(found)["prompts twice as long"]["holds"]
    assert rows(found)["prompts twice as long"]["needed"] is None
    hits = rows(found)["hit rate 40 %"]
    assert (hits["method"], hits["holds"], hits["slo"]) == ("not simulated", None, {})
    assert "nothing of this plan is cached" in hits["reason"]


def test_prefixes_are_forgotten_down_to_the_share_that_is_asked_for() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 30, 400)
    trace = Trace.from_columns(
        name="t",
        arrival_s=np.arange(400.0),
        prompt_tokens=counts * 16,
        output_tokens=np.ones(400),
        block_tokens=16,
        block_ids=np.concatenate([np.arange(n) + 100 * rng.integers(6) for n in counts]),
        block_counts=counts,
    )

    def repeated(one: Trace) -> int:
        return sum(n - 1 for n in Counter(one.block_ids.tolist()).values())

    altered, kept = forgetful(trace, 0.4)
    assert repeated(altered) == pytest.approx(0.4 * repeated(trace), rel=0.02)
    assert 0.3 < kept < 0.6
    same = [i for i in range(400) if len(set(altered.blocks(i)) & set(altered.block_ids[: altered.block_offsets[i]]))]
    assert len(same) < 400 * kept + 1
    assert (altered.prompt_tokens == trace.prompt_tokens).all()
    assert (altered.block_offsets == trace.block_offsets).all()


@pytest.mark.parametrize("gpu", ["h100-sxm", "h100-sxm@datasheet"])
def test_a_slower_link_slows_transfers_alone(gpu: str) -> None:
    fast = load_gpu(gpu)
    slow = slower_link(fast, 0.5)
    nbytes = 1 << 30
    for to_hbm in (True, False):
        seconds = [one.kernels.copy_s(nbytes=nbytes, to_hbm=to_hbm) for one in (fast, slow)]
        assert seconds[1] == pytest.approx(2 * seconds[0], rel=1e-3)
    rows_s = [one.kernels.gather_s(rows=1 << 14, row_bytes=1 << 16, span_bytes=1 << 31) for one in (fast, slow)]
    assert rows_s[1] == pytest.approx(2 * rows_s[0], rel=0.01)
    for of in ("matmul_flops", "hbm_Bps", "nvlink_Bps", "pcie_latency_s"):
        assert getattr(slow.rates, of) == getattr(fast.rates, of)
    reduced = [one.kernels.all_reduce_s(nbytes=nbytes, gpus=8) for one in (fast, slow)]
    assert reduced[0] == reduced[1]
    assert [one.kernels.gemm_s(m=64, n=4096, k=4096, dtype="bf16") for one in (fast, slow)][1] > 0


def test_the_page_and_the_terminal_say_what_changes(
    found: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvsim.cli.plan_output import print_plan

    shown = Document(plan_page(found.to_dict(), "kvsim plan")).table("One change at a time")
    assert [row["change"] for row in shown] == list(rows(found))
    for cells, row in zip(shown, rows(found).values(), strict=True):
        assert cells["tpot_p99"] == row["slo"]["tpot_p99"]
        assert cells["GPUs needed"] == row["needed"]["gpus"]
    print_plan(found.to_dict())
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows(found))
