"""`kvsim plan --out`: the document of --json, and a page whose tables and charts say what the document says."""

import contextlib
import io
import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from page_reader import Document

import traces
from kvsim.__main__ import main
from kvsim.report.plan import plan_page
from traces import Trace

EVIL = "<script>alert(1)</script>"
REQUESTS, RATE_SCALE = 120, 40.0
ASKED = ("--rate-scale", str(RATE_SCALE), "--model", "llama-3.1-8b", "--tp", "1", "--no-pools")
BOUGHT = ("--gpu", "h100-sxm", "--gpu", "l40s", "--policy", "full", "--policy", "shadowkv")
SLO = ("--slo", "ttft_p99=1s,tpot_p99=60ms")


class Planned(NamedTuple):
    """What a plan printed and left behind."""

    code: int
    printed: dict[str, Any]
    html: str
    trace: Trace

    @property
    def page(self) -> Document:
        return Document(self.html)


def planned(folder: Path, *words: str) -> Planned:
    """A plan for requests of two tenants, one of them with a hostile name."""
    base = traces.load("azure-2023-conv", limit=REQUESTS)
    columns = {name: getattr(base, name) for name in ("arrival_s", "prompt_tokens", "output_tokens")}
    trace = Trace.from_columns(name="two", tenant=[0, 1] * (REQUESTS // 2), tenants=(EVIL, "plain"), **columns)
    traces.write(trace, folder / "two.jsonl")
    out = io.StringIO()
    command = ["plan", "--json", "--trace", str(folder / "two.jsonl"), *ASKED, *words, "--out", str(folder / "out")]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main(command)
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["plan.json", "report.html"]
    assert (folder / "out" / "plan.json").read_text() == out.getvalue()
    html = (folder / "out" / "report.html").read_text()
    return Planned(code, json.loads(out.getvalue()), html, trace)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    return planned(tmp_path_factory.mktemp("plan"), *BOUGHT, *SLO)


def facts(page: Document) -> dict[str, str]:
    return {row["what"]: row["plan"] for row in page.table(next(iter(page.tables)))}


def test_the_answer_comes_first(held: Planned) -> None:
    answer, page = held.printed["answer"], held.page
    assert held.code == 0
    before = page.text.partition("Does it hold")[0]
    assert held.printed["sentence"] in before
    found = facts(page)
    assert next(iter(page.tables)) == "The plan."
    assert (found["policy"], found["GPU"]) == (answer["policy"], answer["gpu"])
    assert found["GPUs"].startswith(f"{answer['gpus']} (")
    assert found["cost of a million output tokens"].startswith(f"${answer['cost_per_million_tokens']:.2f} ")
    assert found["head-room"] == f"{answer['headroom']:.0%} more load"
    assert found["bottleneck"] == answer["bottleneck"]
    for row in page.table("What must hold"):
        bound = answer["slo"][row["objective"]]
        assert [row[key] for key in ("limit", "value")] == [bound["limit_s"], bound["value_s"]]
        assert row["held"] == "yes"
        fewer = answer["fewer"]
        if fewer:
            assert (
                row["with 1 GPU" if fewer["gpus"] == 1 else f"with {fewer['gpus']} GPUs"]
                == fewer["slo"][row["objective"]]["value_s"]
            )


def test_the_tables_say_what_the_document_says(held: Planned) -> None:
    document, page = held.printed, held.page
    rows = page.table("The best fleet of each GPU")
    plans = [row for row in document["plans"] if row["gpus"] is not None]
    assert len(rows) == len(plans) == 4
    for shown, row in zip(rows, plans, strict=True):
        assert shown["plan"] == f"{row['policy']} on {row['gpu']}"
        assert shown["GPUs"] == row["gpus"]
        assert shown["$/M tokens"] == row["cost_per_million_tokens"]
        assert shown["ttft_p99"] == row["slo"]["ttft_p99"]["value_s"]
        assert shown["KL (nats)"] == row["quality"]["kl_nats"]
        assert shown["on the front"] == ("yes" if row["pareto"] else "no")
    assert [row["goodput req/s"] for row in page.table("The same fleet at other loads")] == [
        row["goodput_rps"] for row in document["answer"]["load"]["curve"]
    ]
    sources = page.table("What the figures rest on")
    assert len(sources) == len(document["sources"])
    kinds = [row["kind"] for row in sources]
    assert kinds == sorted(kinds, key=("assumed", "fitted", "datasheet", "measured").index)
    for command in (document["answer"]["simulate"], document["answer"]["engines"]["vLLM"]["commands"][0]["command"]):
        assert command in page.text
    again = next(line for line in page.text.splitlines() if line.startswith("kvsim plan "))
    words = shlex.split(again)
    flags = {flag: words.count(flag) for flag in ("--gpu", "--slo", "--no-pools", "--rate-scale", "--json", "--out")}
    assert flags == {"--gpu": 2, "--slo": 1, "--no-pools": 1, "--rate-scale": 1, "--json": 0, "--out": 0}
    assert words[words.index("--slo") + 1] == SLO[1]


def test_load_and_latency_are_drawn_with_the_limit(held: Planned) -> None:
    figure = held.page.figures[1]
    (line,) = figure["layout"]["shapes"]
    assert line["y0"] == line["y1"] == pytest.approx(60)  # of 60 ms
    span_s = held.trace.arrival_s[-1] - held.trace.arrival_s[0]
    rate_rps = REQUESTS / (span_s / RATE_SCALE)
    plans = [row for row in held.printed["plans"] if row["gpus"] is not None]
    for marks, row in zip(figure["data"], plans, strict=True):
        sizes = [row, row["fewer"]] if row["fewer"] else [row]
        assert marks["x"] == pytest.approx([rate_rps / one["gpus"] for one in sizes], rel=1e-5)
        values_s = [one["slo"]["tpot_p99"]["value_s"] for one in sizes]
        assert marks["y"] == pytest.approx([1000 * value_s for value_s in values_s], rel=1e-5)
        assert marks["marker"]["symbol"] == ["circle" if s <= 0.06 else "circle-open" for s in values_s]
    cost = next(one for one in held.page.figures if one["layout"]["xaxis"]["title"]["text"].startswith("$"))
    assert [marks["x"][0] for marks in cost["data"]] == pytest.approx(
        [row["cost_per_million_tokens"] for row in plans], rel=1e-5
    )
    assert [marks["marker"]["symbol"] == ["circle"] for marks in cost["data"]] == [row["pareto"] for row in plans]


def test_memory_time_and_tenants_are_those_of_its_own_run(held: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([*shlex.split(held.printed["answer"]["simulate"])[1:], "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    page = held.page
    (spent,) = page.table("Mean time of a finished request by cause")
    assert {name: spent[name] for name in spent if name not in ("policy", "end to end")} == (
        summary["attribution"]["e2e"]["mean_s"]
    )
    (held_bytes,) = page.table("Bytes held in each tier")
    peaks = [own["peak_bytes"] for name, own in summary["memory"].items() if name.endswith("hbm")]
    assert held_bytes["HBM peak"] == sum(peaks)
    tenants = {row["tenant"]: row["TTFT p99"] for row in page.table("All tenants.")}
    assert tenants == {name: own["ttft_s"]["p99"] for name, own in summary["tenants"].items()}
    assert EVIL in tenants


def test_it_loads_nothing_and_runs_nothing_of_a_name(held: Planned) -> None:
    page = held.page
    assert len(page.scripts) == 3
    assert held.html.count("<script") == 3
    assert page.text.count(EVIL) == 1
    named = [name for _, given in page.tags for name in given]
    assert not {"src", "href", "srcset", "action"} & set(named)
    assert not [name for name in named if name.startswith("on")]


def test_it_is_there_for_everyone(held: Planned) -> None:
    from plotly.graph_objects import Figure

    page = held.page
    tags = [tag for tag, _ in page.tags]
    headings = [int(tag[1]) for tag in tags if tag in ("h1", "h2", "h3")]
    assert headings[:2] == [1, 2]
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert tags.count("table") == tags.count("caption") == len(page.tables)
    assert all(given.get("scope") in ("col", "row") for tag, given in page.tags if tag == "th")
    plots = [given for _, given in page.tags if given.get("class") == "plot"]
    ids = {given.get("id") for _, given in page.tags}
    assert len(plots) == len(page.figures) > 6
    assert all(given["role"] == "img" and given["aria-label"] for given in plots)
    assert all(given["aria-describedby"] in ids for given in plots)
    for figure in page.figures:
        Figure(figure)  # raises ValueError for a property that Plotly would ignore


def test_no_plan_is_said_first_and_what_cannot_serve_has_its_reason(tmp_path: Path) -> None:
    words = ("--gpu", "t4", "--gpu", "h100-sxm", "--slo", "ttft_p99=1us", "--max-gpus", "2")
    (tmp_path / "prices.yaml").write_text(
        "t4: &one {usd_per_hour: 1.0, price_source: a test, price_date: 2026-01-31}\nh100-sxm: *one\n"
    )
    found = planned(tmp_path, *words, "--prices", str(tmp_path / "prices.yaml"))
    page = found.page
    assert found.code == 3
    before = page.text.partition("Does it hold")[0]
    assert "No plan meets the SLO." in before
    assert found.printed["sentence"] in before
    assert next(iter(page.tables)) == "The nearest plan, which does not hold."
    assert "head-room" not in facts(page)
    (row,) = page.table("What must hold")
    assert (row["held"], row["value"]) == ("no", found.printed["nearest"]["slo"]["ttft_p99"]["value_s"])
    assert page.figures[0]["layout"]["yaxis"]["type"] == "log"  # the limit is far below
    reasons = [row["reason"] for row in found.printed["plans"] if row["gpus"] is None]
    assert [row["reason"] for row in page.table("Candidates that cannot serve")] == reasons
    assert reasons
    assert "Latency of the nearest plan" in page.text


def test_what_a_document_does_not_hold_is_left_out(held: Planned) -> None:
    alone = {**held.printed, "partial": True, "answer": None, "nearest": None, "plans": [], "first_answer": None}
    alone["sensitivity"] = []
    page = Document(plan_page(alone, "kvsim plan"))
    assert "Interrupted" in page.text
    assert page.figures == []
    assert list(page.tables) == ["What the figures rest on, what is assumed first."]


def test_names_of_a_document_are_text(held: Planned) -> None:
    def built(name: str) -> Document:
        text = json.dumps(held.printed).replace("shadowkv", name).replace("l40s", name)
        return Document(plan_page(json.loads(text), name))

    page, plain = built(EVIL), built("plain")
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.text.count(EVIL) > 10
    assert not any("<" in marks["name"] + "".join(marks["customdata"]) for one in page.figures for marks in one["data"])


def test_a_folder_that_takes_nothing_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvsim.planning.plan.answered", None)
    (tmp_path / "file").write_text("mine")
    words = ["plan", "--trace", "azure-2023-conv", "--limit", "9", *ASKED, *BOUGHT, *SLO]
    assert main([*words, "--out", str(tmp_path / "file")]) == 2
    assert "is a file; results need a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_run_of_the_plan_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from kvsim.run.simulate import simulate

    monkeypatch.setattr("kvsim.planning.plan.answered", lambda *_: held.printed)
    monkeypatch.setattr("kvsim.run.simulate.simulate", lambda *given: replace(simulate(*given), partial=True))
    words = [
        "plan",
        "--trace",
        "azure-2023-conv",
        "--limit",
        "9",
        *ASKED,
        *BOUGHT,
        *SLO,
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 130
    told = capsys.readouterr()
    assert "interrupted: the page is without a run of the plan" in told.err
    assert held.printed["sentence"] in told.out
    page = Document((tmp_path / "out" / "report.html").read_text())
    assert held.printed["sentence"] in page.text
    assert "Latency of the plan" not in page.text
