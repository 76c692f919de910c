"""Plans and comparisons as notebooks use them: tables, figures, and words for what cannot be drawn."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from page_reader import Document

import traces
from kvsim import Comparison, Plan, Setup, compare, load_gpu, load_host, load_model, plan, summarize
from kvsim.results.summary import Result
from policies import Full, parse_policy

EVIL = "<script>alert(1)</script>"
Make = Callable[..., Result]


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(
        trace="azure-2023-conv",
        limit=100,
        rate_scale=40.0,
        model="llama-3.1-8b",
        gpu=["l40s", "h100-sxm"],
        policy=["full", "shadowkv"],
        slo="ttft_p99=1s,tpot_p99=60ms",
        tp=1,
        pools=False,
    )


def shown(thing: Plan | Comparison) -> Document:
    return Document(thing._repr_html_())


def test_a_plan_shows_its_answer_and_every_plan(found: Plan) -> None:
    page = shown(found)
    assert found.sentence in page.text
    assert found.answer is not None
    assert [row["plan"] for row in page.table("The plan.")][:2] == [found.answer["policy"], found.answer["gpu"]]
    rows = page.table("The best fleet of each GPU")
    assert [row["GPUs"] for row in rows] == [row["gpus"] for row in found.plans]


def test_its_figures_are_those_of_the_document(found: Plan) -> None:
    second, first = found.plot_latency("tpot_p99"), found.plot_latency()
    assert (first.layout.title.text, second.layout.title.text) == ("ttft_p99 by load", "tpot_p99 by load")
    assert [marks.y[0] for marks in second.data] == pytest.approx(
        [1000 * row["slo"]["tpot_p99"]["value_s"] for row in found.plans], rel=1e-5
    )
    assert found.answer is not None
    curve = found.answer["load"]["curve"]
    assert list(found.plot_goodput().data[0].y) == pytest.approx([row["goodput_rps"] for row in curve], rel=1e-5)
    costs = [row["cost_per_million_tokens"] for row in found.plans]
    assert [marks.x[0] for marks in found.plot_cost().data] == pytest.approx(costs, rel=1e-5)
    losses = [row["quality"]["kl_nats"] for row in found.plans]
    assert [marks.y[0] for marks in found.plot_quality().data] == pytest.approx(losses, rel=1e-5)
    assert all(figure.layout.showlegend for figure in (first, second, found.plot_cost()))


def test_what_a_plan_cannot_draw_is_said(found: Plan) -> None:
    with pytest.raises(ValueError, match="objective 'e2e_p99' is none of this plan; it has ttft_p99, tpot_p99"):
        found.plot_latency("e2e_p99")
    full = Plan(found.to_dict() | {"plans": [row for row in found.plans if row["policy"] == "full"]})
    with pytest.raises(ValueError, match="nothing to draw"):
        full.plot_quality()  # nobody loses any
    nothing = Plan(found.to_dict() | {"plans": [], "answer": None, "nearest": None})
    for draw in (nothing.plot_latency, nothing.plot_goodput, nothing.plot_cost):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw()


def test_plan_keeps_its_signature_and_words() -> None:
    import inspect

    assert {"slo", "gpu", "policy", "prices", "options"} <= set(inspect.signature(plan).parameters)
    assert "fewest GPUs" in (plan.__doc__ or "")


def test_compare_gives_what_summarize_gives() -> None:
    def setup(policy: Any) -> Setup:
        gpu, host = load_gpu("h100-sxm"), load_host("ddr5-dual-xeon")
        return Setup(model=load_model("llama-3.1-8b"), policy=policy, gpu=gpu, host=host)

    trace, slo = traces.load("azure-2023-code", limit=20), {"ttft_s": 1.0}
    runs = compare(trace, [setup(Full()), setup(parse_policy("quest"))], slo=slo)
    assert [own["run_id"] for own in runs.summaries] == [summarize(one, slo)["run_id"] for one in runs.results]
    for row, own in zip(runs.rows(), runs.summaries, strict=True):
        assert (row["goodput_rps"], row["ttft_s.p99"]) == (own["goodput_rps"], own["ttft_s"]["p99"])
    rows = shown(runs).table("Memory peaks and PCIe bytes")
    assert [row["policy"] for row in rows] == ["full", "quest"]
    assert [row["TTFT p99"] for row in rows] == [own["ttft_s"]["p99"] for own in runs.summaries]
    assert len(runs.plot_latency("tpot_s").data) == len(runs.plot_memory("ddr").data) == 2
    assert runs.plot_latency().data[0].x[-1] == pytest.approx(runs.summaries[0]["ttft_s"]["max"], rel=1e-5)


def test_names_are_text_in_a_notebook_too(make_result: Make) -> None:
    page = shown(Comparison([make_result(policy=EVIL)]))
    assert page.scripts == []
    assert page.text.count(EVIL) == 2  # in words, and in the table


def test_what_a_comparison_cannot_be_is_said(make_result: Make) -> None:
    with pytest.raises(ValueError, match="0 results to compare"):
        Comparison([])
    with pytest.raises(ValueError, match="latency 'e2e_s' is not drawn; choose one of ttft_s, tpot_s"):
        Comparison([make_result()]).plot_latency("e2e_s")
    with pytest.raises(ValueError, match="tier 'nvme' is not drawn"):
        Comparison([make_result()]).plot_memory("nvme")


def test_rows_go_to_pandas_where_it_is_installed(make_result: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Comparison([make_result(), make_result(seed=1)])
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows: ("table", rows)))
    assert runs.to_pandas() == ("table", runs.rows())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pandas"):
        runs.to_pandas()
