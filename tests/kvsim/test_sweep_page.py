"""The page of a sweep: its tables and charts against the rows that they are made of."""

import json
from pathlib import Path
from typing import Any

import pytest
from page_reader import Document

from kvsim.__main__ import main
from kvsim.report.dimensions import grouped
from kvsim.report.sweep import sweep_page

EVIL = "<script>alert(1)</script>"
GIB = 2**30


def row(point: int, tokens_per_s: float | None, **dims: Any) -> dict[str, Any]:
    """A point of a sweep; one without tokens is impossible."""
    if tokens_per_s is None:
        return {"point": point, **dims, "status": "impossible", "reason": f"no {EVIL} room"}
    latencies = {"ttft_s.p99": 2 / tokens_per_s, "tpot_s.p99": 0.01, "bottleneck": "hbm"}
    return {"point": point, **dims, "status": "done", "reason": None, "output_tokens_per_s": tokens_per_s, **latencies}


def page(rows: list[dict[str, Any]], *dims: str, **further: Any) -> Document:
    document = {"over": {key: [row[key] for row in rows] for key in dims}, "draw": None, "options": {}, **further}
    return Document(sweep_page(document, rows, "kvsim sweep --over x --out DIR"))


GRID = [
    row(i * 6 + j * 2 + k, 100.0 * (i + 1) + 10 * j + k, gpus=gpus, prefix_cache_ddr=size, policy=policy)
    for i, gpus in enumerate((1, 2, 8))
    for j, size in enumerate(("0", "512MiB", "2GiB"))
    for k, policy in enumerate(("full", "quest"))
]
DIMS = ("gpus", "prefix_cache_ddr", "policy")


def test_the_best_points_come_first_and_every_point_is_there() -> None:
    found = page(GRID, *DIMS)
    assert "Most output tokens/s: 321, at gpus 8, prefix_cache_ddr 2GiB, policy quest." in found.text
    best = {own["figure"]: own for own in found.table("The point where each figure is best.")}
    assert (best["tokens/s"]["best"], best["tokens/s"]["point"]) == (321, 17)
    assert (best["TTFT p99"]["best"], best["TTFT p99"]["policy"]) == (2 / 321, "quest")
    assert (best["TPOT p99"]["point"], best["TPOT p99"]["shared by"]) == (0, "and 17 more")
    assert "goodput/s" not in best  # nobody bounded anything
    points = found.table("Every point.")
    assert [own["tokens/s"] for own in points] == [own["output_tokens_per_s"] for own in GRID]
    assert [own["gpus"] for own in points] == [own["gpus"] for own in GRID]
    boxes = [given["class"] for tag, given in found.tags if given.get("role") == "region"]
    assert boxes.count("scroll tall") == 1
    assert "this table scrolls" in found.scripts[2]


def test_lines_join_the_points_that_differ_in_the_first_dimension_alone() -> None:
    figure = page(GRID, *DIMS).figures[0]
    assert figure["layout"]["xaxis"]["title"]["text"] == "gpus"
    assert len(figure["data"]) == 6
    for number, line in enumerate(figure["data"]):
        size, policy = divmod(number, 2)
        assert line["x"] == [1, 2, 8]
        assert line["y"] == [100 * i + 10 * size + policy for i in (1, 2, 3)]
        assert line["mode"] == "lines+markers"
    colours = [line["line"]["color"] for line in figure["data"]]
    assert colours[0] == colours[1]
    assert len(set(colours)) == 3  # one for each size of cache
    assert len({line["line"]["dash"] for line in figure["data"]}) == 2  # one for each policy


def test_sizes_are_an_axis_of_bytes_and_names_one_of_categories() -> None:
    sized = page(GRID, "policy", "prefix_cache_ddr", "gpus").figures[0]
    assert sized["layout"]["xaxis"]["title"]["text"] == "prefix_cache_ddr (GiB)"
    assert sized["data"][0]["x"] == [0, 0.5, 2]
    named = page(GRID[:2], "policy").figures[0]
    assert named["layout"]["xaxis"]["ticktext"] == ["full", "quest"]
    assert named["data"][0]["x"] == [0, 1]


def test_points_drawn_at_random_are_coloured_by_quarters() -> None:
    rows = [row(i, 100.0 + i, rate_scale=1 + (i * 37 % 100) / 10, max_num_seqs=i) for i in range(100)]
    groups, joined = grouped(rows, "rate_scale", ["rate_scale", "max_num_seqs"])
    assert not joined
    assert [len(group.rows) for group in groups] == [25] * 4
    assert sorted(i for group in groups for i in group.rows) == list(range(100))
    assert [group.label for group in groups] == [
        f"max_num_seqs {low} to {high}" for low, high in ((0, 24), (24, 49), (49, 74), (74, 99))
    ]
    for number, group in enumerate(groups):
        assert {i // 25 for i in group.rows} == {number}
    marks = page(rows, "rate_scale", "max_num_seqs", draw=100).figures[0]["data"]
    assert all(one["mode"] == "markers" for one in marks)
    assert sum(len(one["x"]) for one in marks) == 100


def test_names_are_text_and_what_is_impossible_has_its_reason() -> None:
    rows = [row(0, 5.0, policy=EVIL), row(1, None, policy="full")]
    found = page(rows, "policy", options={EVIL: {EVIL: EVIL}})
    assert found.table("Every point.")[1]["status"] == f"impossible: no {EVIL} room"
    assert len(found.scripts) == 3
    assert "alert" not in found.scripts[2]
    assert not any("<" in text for one in found.figures for text in one["layout"]["xaxis"]["ticktext"])
    assert not {"src", "href", "srcset"} & {name for _, given in found.tags for name in given}


def test_many_points_stay_a_page_and_say_what_is_left_out() -> None:
    rows = [row(i, 100.0 + i % 7, gpus=i % 50, tp=i // 50) for i in range(9_000)]
    found = page(rows, "gpus", "tp")
    assert len(found.table("The first 1,000 points of 9,000; sweep.parquet has all.")) == 1000
    assert sum(len(marks["x"]) for marks in found.figures[0]["data"]) == 3_000
    assert "A mark for 3,000 of 9,000 points, evenly taken." in found.text


def test_nothing_found_is_said() -> None:
    found = page([row(0, None, gpus=1)], "gpus")
    assert "No point has figures." in found.text
    assert found.figures == []


def test_plotly_knows_every_property() -> None:
    from plotly.graph_objects import Figure

    for figure in page(GRID, *DIMS).figures + page(GRID[:2], "policy").figures:
        Figure(figure)


def test_the_command_leaves_it_in_the_folder_and_says_how_to_run_it_again(tmp_path: Path) -> None:
    words = ["sweep", "--trace", "azure-2023-code", "--limit", "20", "--model", "llama-3.1-8b", "--gpu", "h100-sxm"]
    out = tmp_path / "out"
    assert main([*words, "--over", "gpus=1,2", "--out", str(out)]) == 0
    found = Document((out / "report.html").read_text())
    document = json.loads((out / "sweep.json").read_text())
    assert [own["tokens/s"] for own in found.table("Every point.")] == [
        own["output_tokens_per_s"] for own in document["points"]
    ]
    assert "kvsim sweep --over gpus=1,2 --trace azure-2023-code --limit 20 " in found.text
    assert str(tmp_path) not in found.text
    before = (out / "report.html").read_bytes()
    assert main([*words, "--over", "gpus=1,2", "--out", str(out), "--json"]) == 0
    assert (out / "report.html").read_bytes() == before


@pytest.mark.parametrize("name", ["report.html", "sweep.json"])
def test_a_folder_in_its_way_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).mkdir()
    words = ["sweep", "--trace", "azure-2023-code", "--limit", "9", "--model", "llama-3.1-8b", "--gpu", "h100-sxm"]
    assert main([*words, "--over", "gpus=1", "--out", str(tmp_path)]) == 2
    assert "results need a file of this name" in capsys.readouterr().err
