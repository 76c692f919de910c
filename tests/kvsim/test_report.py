"""The report page: its tables against the summaries, its charts against the data, and that no input can break out."""

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from page_reader import Document

from kvsim.report.report import report_html
from kvsim.report.runs import runs_of
from kvsim.results.summary import Result, latencies, summarize
from kvsim.text.units import format_s

Make = Callable[..., Result]
EVIL = "<script>alert(1)</script>"
POLICIES = ["full", "shadowkv:budget_tokens=2048,rank=160", "offload-all"]


def report(results: Sequence[Result], **options: Any) -> Document:
    return Document(report_html(results, **options))


@pytest.fixture
def compared(make_result: Make) -> list[Result]:
    return [make_result(policy=policy, seed=seed) for seed, policy in enumerate(POLICIES)]


def test_the_comparison_shows_the_summaries(compared: list[Result]) -> None:
    slo = {"ttft_s": 3.0}
    page = report(compared, slo=slo, warmup_s=60.0)
    rows = page.table("Memory peaks and PCIe bytes")
    assert [row["policy"] for row in rows] == POLICIES
    for row, result in zip(rows, compared, strict=True):
        summary = summarize(result, slo, 60.0)
        counts = [row[name] for name in ("finished", "rejected", "timed out")]
        assert counts == list(summary["requests"].values())[1:]
        assert row["output tokens/s"] == summary["output_tokens_per_s"]
        assert row["goodput req/s"] == summary["goodput_rps"]
        for figure, name in (("TTFT", "ttft_s"), ("TPOT", "tpot_s")):
            assert row[f"{figure} p50"] == summary[name]["p50"]
            assert row[f"{figure} p99"] == summary[name]["p99"]
        assert row["queue p99"] == summary["queue_s"]["p99"]
        memory, links = summary["memory"], summary["links"]
        assert row["HBM peak"] == memory["gpu0.hbm"]["peak_bytes"] + memory["gpu1.hbm"]["peak_bytes"]
        assert row["DDR peak"] == memory["host.ddr"]["peak_bytes"]
        # Of the five links two join a GPU to its host; one is NVLink, and two lead to the SMs.
        assert row["PCIe bytes"] == sum(links[x]["bytes"] for x in ("host.ddr->gpu0.hbm", "gpu0.hbm->host.ddr"))
        assert row["cached prompt"] == summary["tokens"]["prompt_cached"] / summary["tokens"]["prompt"]
        assert row["preemptions"] == result.requests["preemptions"].sum()
        assert row["bottleneck"] == summary["bottleneck"]
    for heading, best in (("output tokens/s", max), ("TTFT p99", min), ("TPOT p50", min)):
        assert best(row[heading] for row in rows) in page.strong
    assert f"{format_s(60)}." in page.text
    assert "ttft_s ≤ 3" in page.text


def test_the_other_tables_show_the_summaries(compared: list[Result]) -> None:
    page, summaries = report(compared), dict(zip(POLICIES, map(summarize, compared), strict=True))
    for row in page.table("Share of the makespan"):
        assert {name: row[name] for name in row if name != "policy"} == summaries[row["policy"]]["busy"]
    for row in page.table("Mean time of a finished request by cause"):
        spent = {name: row[name] for name in row if name not in ("policy", "end to end")}
        assert spent == summaries[row["policy"]]["attribution"]["e2e"]["mean_s"]
        assert sum(spent.values()) == pytest.approx(row["end to end"])
    for row in page.table("Prefix cache"):
        blocks = summaries[row["policy"]]["cache"][row["tier"]]
        assert (row["lookups"], row["hits"]) == (blocks["lookup_blocks"], blocks["hit_blocks"])
    for row in page.table("Bytes held"):
        assert (row["HBM capacity"], row["DDR capacity"]) == (160 * 2**30, 1024 * 2**30)
    links = page.table("Links that moved bytes")
    sms = next(row for row in links if (row["policy"], row["link"]) == ("full", "gpu*.hbm->gpu*.sm"))
    both = [summaries["full"]["links"][f"gpu{index}.hbm->gpu{index}.sm"] for index in (0, 1)]
    assert sms["links"] == 2
    assert sms["bytes"] == both[0]["bytes"] + both[1]["bytes"]
    assert sms["highest"] == max(link["utilization"] for link in both)


def test_bars_of_a_link_add_up_to_its_bytes(compared: list[Result]) -> None:
    page = report(compared)
    titles = re.findall(r'aria-label="([^"]*)"></div>', report_html(compared))
    figure = dict(zip(titles, page.figures, strict=True))["host.ddr-&gt;gpu*.hbm"]
    assert figure["layout"]["xaxis"]["title"]["text"] == "TiB"
    for row, result in enumerate(compared):
        shown_bytes = sum(trace["x"][row] for trace in figure["data"]) * 2**40
        assert shown_bytes == pytest.approx(result.links["host.ddr->gpu0.hbm"]["bytes"], rel=1e-5)


def test_lines_are_shares_of_the_requests(make_result: Make) -> None:
    result = make_result(count=2000)
    line = report([result]).figures[0]["data"][0]
    ttft_s = latencies(result)["ttft_s"]
    ttft_s = ttft_s[~np.isnan(ttft_s)]
    assert line["y"][0] == 0
    assert line["y"][-1] == 1
    for x, y in list(zip(line["x"], line["y"], strict=True))[1::20]:
        # Both are written with six digits, so the request itself may lie on either side of its x.
        assert (ttft_s <= x * 0.99999).mean() <= y + 1e-6 <= (ttft_s <= x * 1.00001).mean() + 2e-6


def test_text_from_inputs_stays_text(make_result: Make) -> None:
    names = dict.fromkeys(("trace", "requests", "model", "gpu", "gpus", "tp", "host"), EVIL)
    moved = {f"{EVIL}->gpu0.hbm": {EVIL: 5}}
    results = [
        make_result(
            tenants=(EVIL, "plain"),
            inputs=names | {"policy": f"{policy}{EVIL}", "options": {EVIL: [EVIL]}, "trace_notes": [EVIL]},
            memory={f"{EVIL}.{EVIL}": {"capacity_bytes": 9.0, "peak_bytes": 8.0, "mean_bytes": 7.0}},
            links={link: {"bytes": 5.0, "busy_s": 1.0, "utilization": 0.5} for link in moved},
            traffic=moved,
            cache={EVIL: {"lookup_blocks": 2, "hit_blocks": 1}},
            busy={EVIL: 0.5},
        )
        for policy in ("a", "b")
    ]
    html = report_html(results)
    page = Document(html)
    assert html.count("<script") == 3  # the figures, Plotly, and what draws
    assert len(page.scripts) == 3
    assert page.text.count(EVIL) > 20
    assert "alert" not in page.scripts[2]
    assert "<" not in page.scripts[0]
    ticks = page.figures[-1]["layout"]["yaxis"]["ticktext"]
    assert ticks == ["a&lt;script&gt;alert(1)&lt;/script&gt;", "b&lt;script&gt;alert(1)&lt;/script&gt;"]
    on_handlers = [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert on_handlers == []


def test_the_page_may_run_its_own_scripts_only_and_loads_nothing(compared: list[Result]) -> None:
    page = report(compared)
    (policy,) = (x["content"] for tag, x in page.tags if tag == "meta" and x.get("http-equiv"))
    assert policy is not None
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    assert allowed == {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts[1:]}
    assert policy.startswith("default-src 'none';")
    assert not [x for _, attributes in page.tags for x in attributes if x in ("src", "href", "srcset", "action")]
    assert "@import" not in page.text


def test_headings_captions_and_labels_are_there_for_everyone(compared: list[Result]) -> None:
    page = report(compared)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("table") == tags.count("caption") == len(page.tables)
    assert tags.count("figure") == tags.count("figcaption") == len(page.figures)
    assert ("html", {"lang": "en"}) in page.tags
    plots = [x for tag, x in page.tags if tag == "div" and x.get("class") == "plot"]
    assert [x["id"] for x in plots] == [f"plot-{index}" for index in range(len(page.figures))]
    assert all(x["role"] == "img" and x["aria-label"] for x in plots)
    assert all(x.get("scope") in ("col", "row") for tag, x in page.tags if tag == "th")


def test_plotly_knows_every_property(compared: list[Result]) -> None:
    from plotly.graph_objects import Figure

    figures = report(compared).figures
    assert (
        len(figures) == 2 + 2 + 2 + 1 + 4
    )  # latencies, what they were spent on, memories, places, and four kinds of link
    for figure in figures:
        Figure(figure)  # raises ValueError for a property that Plotly would ignore


def test_many_long_runs_stay_a_page_below_8_mb(make_result: Make) -> None:
    runs = [make_result(policy=f"quest:budget_tokens={n}", count=3000, tenants=tuple("abcdef")) for n in range(30)]
    assert len(report_html(runs).encode()) < 8e6


def test_tenants_have_a_table_when_there_are_several(make_result: Make) -> None:
    assert "Tenants" not in report([make_result()]).text
    few = make_result(tenants=("chat", "code"))
    rows = report([few]).table("All tenants.")
    for row in rows:
        own = summarize(few)["tenants"][row["tenant"]]
        assert [row[x] for x in ("submitted", "finished", "rejected", "timed out")] == list(own["requests"].values())
        assert row["TTFT p99"] == own["ttft_s"]["p99"]
        assert row["output tokens/s"] == own["output_tokens_per_s"]
    assert [row["tenant"] for row in rows] == ["chat", "code"]
    many = make_result(tenants=tuple(f"tenant {n}" for n in range(120)))
    assert len(report([many]).table("The 50 tenants with most requests of 120.")) == 50


def test_an_input_says_which_flag_gives_it(make_result: Make) -> None:
    inputs = {"policy": "full", "gpus": 4, "warmup_s": 0.0, "tenants": {"a": {"weight": 2}}, "trace_sha256": "x"}
    page = report_html([make_result(inputs=inputs)])
    assert '<th scope="row" title="--gpus: All GPUs; the replicas are gpus / (tp x pp).">gpus</th>' in page
    assert '<th scope="row" title="--warmup: Leave requests that arrive earlier out of the latencies.">' in page
    assert re.search(r'title="--tenant: A tenant&#39;s weight[^"<>]*">tenants.a.weight</th>', page)
    assert '<th scope="row">trace_sha256</th>' in page


def test_inputs_that_differ_stand_side_by_side(compared: list[Result]) -> None:
    page = report(compared)
    shared = {row["input"]: row["value"] for row in page.table("Inputs that all runs share.")}
    assert shared["trace"] == "synthetic"
    assert shared["options.limit"] == "null"
    differing = {row.pop("input"): list(row.values()) for row in page.table("Inputs that differ.")}
    assert differing == {"policy": POLICIES, "options.seed": ["0", "1", "2"]}


def test_equal_policies_are_told_apart(make_result: Make) -> None:
    page = report([make_result(policy="full", seed=seed) for seed in (1, 2)])
    assert [row["policy"] for row in page.table("Memory peaks")] == ["full (1)", "full (2)"]


def test_the_lead_says_what_came_out(make_result: Make) -> None:
    slow, fast = make_result(policy="slow", makespan_s=900.0), make_result(policy="fast", makespan_s=450.0)
    assert re.search(r"fast gives \d+ output tokens/s, 2\.00 times those of slow\.", report([slow, fast]).text)


def test_nothing_finished_is_said_and_shown(make_result: Make) -> None:
    full = make_result()
    requests = full.requests | {"status": np.full(len(full.requests["status"]), "rejected")}
    page = report([make_result(requests=requests, series={name: x[:0] for name, x in full.series.items()})])
    assert "No request finished." in page.text
    assert "Trace: its arrivals are uniform" in page.text
    assert "0 of 200 requests finished, 200 were rejected" in page.text
    (row,) = page.table("Memory peaks")
    assert row["TTFT p50"] == "-"
    assert row["output tokens/s"] == 0


def test_a_result_without_memories_links_or_names_still_has_a_page(make_result: Make) -> None:
    bare = make_result(inputs={"policy": "full"}, memory={}, links={}, traffic={}, cache={}, busy={})
    page = report([bare])
    assert page.text.count("not stated") == 9  # seven facts, and the trace in the title and the heading
    assert "Prefix cache" not in page.text


@pytest.mark.parametrize(
    ("link", "crosses"),
    [
        ("hbm->ddr", True),
        ("ddr->hbm", True),
        ("gpu3.hbm->pcie1", True),
        ("pcie1->host.root", False),  # the same bytes, further on
        ("host.nvme->gpu0.hbm", True),
        ("gpu0.hbm->gpu0.sm", False),
        ("gpu0.hbm->gpu1.hbm", False),
        ("nvlink->gpu0.hbm", False),
        ("ddr->cpu", False),
        ("nic", False),
    ],
)
def test_pcie_bytes_are_counted_at_the_gpu(make_result: Make, link: str, crosses: bool) -> None:
    result = make_result(links={link: {"bytes": 7.0, "busy_s": 1.0, "utilization": 0.1}}, traffic={})
    (run,) = runs_of([result], None, 0.0)
    assert run.pcie_bytes() == (7.0 if crosses else 0.0)


def test_no_results_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 0 results to report; a report needs at least 1"):
        report_html([])
