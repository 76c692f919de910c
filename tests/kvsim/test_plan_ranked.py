"""All configurations of a plan, ranked, and their front of cost and latency, against hand-made and simulated ones."""

from typing import Any

import pytest
from page_reader import Document

import traces
from kvsim import Plan, Setup, default_host, load_gpu, load_host, load_model, plan, simulate, summarize
from kvsim.cli.plan_ranked import front_lines, print_front, print_ranked
from kvsim.report.plan import plan_page
from policies import parse_policy

MODEL = "llama-3.1-8b"
ASKED: dict[str, Any] = {"trace": "azure-2023-conv", "limit": 200, "rate_scale": 40.0, "model": MODEL}


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(gpu=["h100-sxm", "a100-80g-sxm"], policy="full", slo="ttft_p99=1s,tpot_p99=30ms", **ASKED)


def test_every_row_is_a_plain_simulation_and_they_are_ranked(found: Plan) -> None:
    rows, trace = found.to_dict()["configurations"], traces.load("azure-2023-conv", limit=200).scaled_rate(40)
    assert {bool(row["prefill_gpus"]) for row in rows} == {False, True}
    assert len({(row["gpu"], row["tp"], row["gpus"], row["prefill_gpus"]) for row in rows}) == len(rows) > 4
    for row in rows:
        gpu = load_gpu(row["gpu"])
        split = {name: row[name] for name in ("gpus", "tp", "pp", "prefill_gpus")}
        host, policy = load_host(default_host(gpu.name)), parse_policy(row["policy"])
        fleet = Setup(model=load_model(MODEL), policy=policy, gpu=gpu, host=host, **split)
        summary = summarize(simulate(trace, fleet))
        assert row["slo"] == {"ttft_p99": summary["ttft_s"]["p99"], "tpot_p99": summary["tpot_s"]["p99"]}
        assert row["output_tokens_per_s_per_gpu"] == pytest.approx(summary["output_tokens_per_s"] / row["gpus"])
        assert row["of_limit"] == pytest.approx(max(row["slo"]["ttft_p99"], row["slo"]["tpot_p99"] / 0.03))
        assert row["holds"] == (row["of_limit"] <= 1)
    held = [row["usd_per_hour"] for row in rows if row["holds"]]
    assert [row["holds"] for row in rows] == [True] * len(held) + [False] * (len(rows) - len(held))
    assert held == sorted(held)
    assert found.answer is not None
    assert held[0] == found.answer["usd_per_hour"]


def test_the_front_is_what_nothing_beats(found: Plan) -> None:
    rows = found.to_dict()["configurations"]
    points = [(row["usd_per_hour"], row["of_limit"]) for row in rows]
    for row, (usd, share) in zip(rows, points, strict=True):
        beaten = any(u <= usd and s <= share and (u, s) != (usd, share) for u, s in points)
        assert row["front"] is not beaten


def test_of_a_fixed_size_the_largest_load_comes_first() -> None:
    found = plan(gpu="h100-sxm", policy="full", slo="ttft_p99=1s,tpot_p99=30ms", gpus=4, **ASKED)
    rows = found.to_dict()["configurations"]
    loads = [row["sustained"] for row in rows if row["holds"]]
    assert len(loads) > 2
    assert loads == sorted(loads, reverse=True)
    assert found.answer is not None
    assert loads[0] == found.answer["load"]["holds_at"]
    assert all(row["gpus"] == 4 for row in rows)


def row(usd: float, of_limit: float, policy: str, **further: Any) -> dict[str, Any]:
    base = {"gpu": "g", "policy": policy, "options": [], "usd_per_hour": usd, "of_limit": of_limit, "front": False}
    return {**base, **further}


def test_points_are_drawn_where_they_lie() -> None:
    rows = [row(10, 0.5, "a", front=True), row(20, 2.0, "b"), row(30, 9.0, "a"), row(20, 1.0, "b", front=True)]
    lines = front_lines(rows, ["a on g", "b on g"])
    plot = [line.partition("|")[2].ljust(64) for line in lines[:17]]
    assert plot[12][0] == "A"  # a quarter of the way up from 0 % to 200 %
    assert (plot[0][32], plot[0][63]) == ("b", "a")  # at 200 %, and beyond
    assert plot[8][32] == "B"
    assert set(plot[8]) == {"-", "B"}
    assert lines[8].startswith("    SLO |")
    assert "10.00" in lines[-2]
    assert "30.00" in lines[-2]


def test_terminal_and_page_list_them(found: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    rows = found.to_dict()["configurations"]
    print_ranked(rows)
    print_front(rows)
    printed = capsys.readouterr().out
    assert "Prompts and decoding together, ranked" in printed
    assert "Prompts and decoding on replicas of their own, ranked" in printed
    assert "on the front" in printed
    shown = Document(plan_page(found.to_dict(), "kvsim plan")).table("Every split that was simulated")
    assert [cells["$/hour"] for cells in shown] == [row["usd_per_hour"] for row in rows]
