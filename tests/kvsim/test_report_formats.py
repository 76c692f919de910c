"""Reports as Markdown, JSON and CSV: the page's tables, exact, and text that stays text for whoever reads it."""

import contextlib
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from kvsim.__main__ import main
from kvsim.report.formats import in_format
from kvsim.report.page import Contents, Page, Table, name_cell, number_cell, table, text_cell
from kvsim.report.report import report_contents
from kvsim.results.summary import Result

EVIL = (
    *("<script>alert(1)</script>", "a | b", "`code`", "**bold**", "_it_", "[x](http://e.org)", "![i](x.png)", "# head"),
    *("1. one", "2) two", "- item", "+ item", "~~no~~", "two\nlines", "back\\slash", "&lt;b&gt;", "$x$", "```", "<b>"),
    *(
        "[ref]: http://e.org",
        "https://e.org|x",
        "===",
        "---",
        "- - -",
        "12. dozen",
        "1.5 s",
        "-",
        "#",
        "closing #",
        "> quoted",
        "trailing\\",
    ),
)
FORMULAS = ("=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", "  =1")
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def contents(*texts: str, command: str = "kvsim sweep") -> Contents:
    """A sweep's page with these texts where names and reasons stand."""
    rows = [
        [name_cell(text), number_cell(1 / (i + 3), "{:.2f}".format), text_cell(text)] for i, text in enumerate(texts)
    ]
    every = table("Every point.", ["point", "figure", "text"], rows, ["text"])
    shown: dict[str, Any] = {
        "facts": dict.fromkeys(texts, texts[0]),
        "finding": texts[0],
        "best": None,
        "charts_drawn": [],
        "points": every,
        "over": every,
        "options": every,
        "command": command,
        "version": "1",
    }
    return Page().contents("sweep", texts[0], {}, main=every, **shown)


def inline(tokens: list[Token]) -> list[Token]:
    return [token for token in tokens if token.type == "inline"]


def text_of(token: Token) -> str:
    """What somebody reads, where it is nothing but text."""
    assert {one.type for one in token.children or []} <= {"text", "text_special"}, token.content
    return "".join(one.content for one in token.children or [])


@pytest.mark.parametrize("text", [*EVIL, *FORMULAS])
def test_in_markdown_text_is_text(text: str) -> None:
    tokens = MARKDOWN.parse(in_format(contents(text), "md"))
    assert not [token for token in tokens if token.type in ("html_block", "blockquote_open", "ordered_list_open", "hr")]
    line = " ".join(text.replace("\n", " ").split())
    read = [" ".join(text_of(token).split()) for token in inline(tokens)]
    assert read.count(line) == 2 + 2 * 3  # the title, the finding, and a name and a text in each table
    assert f"{line}: {line}" in read
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2", "h2", "h2"]
    assert [token.type for token in tokens].count("table_open") == 3


@pytest.mark.parametrize("command", ["kvsim plan --slo 'a'", "kvsim ```\n# x\n```` y", "a <b> & `c`"])
def test_a_command_stands_in_a_fence_that_it_does_not_end(command: str) -> None:
    (fence,) = (
        token for token in MARKDOWN.parse(in_format(contents("a", command=command), "md")) if token.type == "fence"
    )
    assert fence.content == f"{command}\n"


@pytest.mark.parametrize("text", [*EVIL, *FORMULAS])
def test_in_csv_figures_are_exact_and_nothing_is_a_formula(text: str) -> None:
    heading, row = csv.reader(io.StringIO(in_format(contents(text), "csv"), newline=""))
    assert heading == ["point", "figure", "text"]
    assert float(row[1]) == 1 / 3
    assert row[0] == row[2]
    assert row[0].removeprefix("'") == ("" if text == "-" else text)  # which stands for a figure that is missing
    assert row[0].lstrip(" ")[:1] not in ("=", "+", "-", "@", "\t", "\r")


def test_json_has_the_tables_exactly_and_the_points_of_charts(make_result: Callable[..., Result]) -> None:
    page = report_contents([make_result(policy="full <b>"), make_result(policy="quest")], identity={"run_id": "1"})
    document = json.loads(in_format(page, "json"))
    compared: Table = page.shown["compared"]
    assert document["compared"]["columns"] == [heading for heading, _ in compared.headings]
    for row, cells in zip(document["compared"]["rows"], compared.rows, strict=True):
        for value, cell in zip(row, cells, strict=True):
            assert value == (cell.text if cell.kind != "figure" else cell.exact and float(cell.exact))
    chart = page.shown["latency"][0]
    lines = page.figures[chart.number]["data"]
    assert [line["x"] for line in document["latency"][0]["lines"]] == [line["x"] for line in lines]
    assert document["latency"][0]["lines"][0]["name"] == "full <b>"
    assert document["identity"] == {"run_id": "1"}


def run(*words: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main([*words])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def reports(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("report."))


REPLAY = ("--trace", "azure-2023-code", "--limit", "20", "--model", "llama-3.1-8b", "--gpu", "l40s")


def test_a_comparison_leaves_the_formats_that_are_asked_for_and_no_earlier_ones(tmp_path: Path) -> None:
    compare = ("compare", *REPLAY, "--policy", "full", "--policy", "quest", "--out", str(tmp_path / "out"))
    assert run(*compare, *(f"--format={name}" for name in ("csv", "md", "json", "html", "md"))) == 0
    assert reports(tmp_path / "out") == ["report.csv", "report.html", "report.json", "report.md"]
    rows = rows_of(tmp_path / "out" / "report.csv")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for row, own in zip(rows, summary["runs"], strict=True):
        assert row["policy"] == own["inputs"]["policy"]
        assert float(row["TTFT p99"]) == own["ttft_s"]["p99"]
    assert run(*compare, "--format", "md") == 0
    assert reports(tmp_path / "out") == ["report.md"]
    assert run(*compare) == 0
    assert reports(tmp_path / "out") == ["report.html"]


def test_a_sweep_and_a_plan_have_the_same_formats(tmp_path: Path) -> None:
    swept, bought = tmp_path / "swept", tmp_path / "bought"
    asked = ("--format", "csv", "--format", "md")
    assert run("sweep", *REPLAY, "--over", "gpus=1,2", "--out", str(swept), *asked) == 0
    assert reports(swept) == ["report.csv", "report.md"]
    points = rows_of(swept / "report.csv")
    assert [row["gpus"] for row in points] == ["1", "2"]
    swept_rows = json.loads((swept / "sweep.json").read_text())["points"]
    assert [float(row["TTFT p99"]) for row in points] == [row["ttft_s.p99"] for row in swept_rows]
    assert (
        run("plan", *REPLAY, "--slo", "ttft_p99=5s", "--no-pools", "--out", str(bought), *asked, "--format", "json")
        == 0
    )
    assert reports(bought) == ["report.csv", "report.json", "report.md"]
    document = json.loads((bought / "plan.json").read_text())
    (row, *_) = rows_of(bought / "report.csv")
    assert float(row["$/M tokens"]) == document["plans"][0]["cost_per_million_tokens"]
    assert document["sentence"].replace("_", "\\_").replace("$", "\\$") in (bought / "report.md").read_text()
    assert json.loads((bought / "report.json").read_text())["sentence"] == document["sentence"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "pdf", "--out", "x"), "unknown --format 'pdf'; did you mean"),
        (("--format", "md"), "--format md is of the report that --out writes; add --out DIR"),
    ],
)
def test_a_format_that_cannot_be_is_refused(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *REPLAY, *words]) == 2
    assert message.partition(";")[0] in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
