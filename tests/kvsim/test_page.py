"""Pages as HTML: whatever stands in a name is text, in an attribute, in a cell and in the charts' JSON alike."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jinja2
import pytest
from page_reader import Document

import kvsim.report.page
from kvsim.report.page import Page, name_cell, number_cell, table, text_cell
from kvsim.report.quality import quality_page
from kvsim.report.report import report_html
from kvsim.results.summary import Result

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</title></style></main><img src=x onerror=alert(1)>",
    "<!-- <script>",
    "]]>",
    '" onmouseover="alert(1)" x=\'',
    "${7*7} {{ 7*7 }} {% raw %} {# no comment #}",
    "&lt;b&gt; &amp; &#x41;",
    "a:b=c,d:e=f",
    "\u2028\u2029\x00\u202e\\u003c",
)
TEMPLATES = Path(kvsim.report.page.__file__).parent / "templates"


def page_of(name: str) -> str:
    page = Page()
    chart = page.chart(name, name, {"data": [{"type": "bar", "name": name}], "layout": {}})
    means = table(name, [name, "n"], [[name_cell(name, "solid #000000"), number_cell(0.25, lambda _: name)]])
    return page.html(
        "quality", name, {"x": name}, measured=name, policies=[(name, "")], divergence=[chart], means=means
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_wherever_it_stands(name: str) -> None:
    html = page_of(name)
    page = Document(html)
    # In the title, the heading, the lead, a legend, a chart's title and caption; a table's caption, head and two cells.
    assert page.text.count(name) == 10
    assert page.figures[0]["data"][0]["name"] == name
    labels = [value for _, given in page.tags for key, value in given.items() if key in ("aria-label", "content")]
    assert labels.count(name) == 3  # the identity, the plot, the table
    assert len(page.scripts) == 3
    assert "<" not in page.scripts[0]
    # The tags are those of a page with a plain name, but for where a policy's name may break.
    plain = Document(page_of("plain"))
    assert [tag for tag, _ in page.tags if tag != "wbr"] == [tag for tag, _ in plain.tags]
    assert [set(given) for _, given in page.tags if given] == [set(given) for _, given in plain.tags if given]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_a_simulation_are_text(make_result: Callable[..., Result], name: str) -> None:
    def built(own: str) -> Document:
        inputs = dict.fromkeys(("trace", "model", "gpu", "host"), own) | {"policy": own, "options": {own: own}}
        inputs["trace_notes"] = [own]
        results = [make_result(tenants=(own, "b"), inputs=inputs | {"seed": n}, count=20) for n in (1, 2)]
        return Document(report_html(results, missing=[own], identity={"run_id": own}))

    page, plain = built(name), built("plain")
    assert len(page.scripts) == 3
    assert [tag for tag, _ in page.tags if tag != "wbr"] == [tag for tag, _ in plain.tags]
    assert page.text.count(name) >= 30
    bars = page.figures[-1]["layout"]["yaxis"]["ticktext"]  # Plotly reads tags there, even if the page's are escaped
    assert not any("<" in label for label in bars)


def quality(policy: str, contexts: tuple[int, ...] = (2048, 4096)) -> dict[str, Any]:
    def interval(mean: float, half: float | None) -> dict[str, Any]:
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return {"mean": mean, "low": low, "high": high, "places": [mean]}

    rows = [
        {
            "policy": name,
            "context_tokens": context,
            "kl_nats": interval(0.1 * index + context / 1e5, None if context == 4096 else 0.01),
            "nll_nats": interval(-0.02, 0.005),
            "top1_share": interval(0.97, 0.01),
            "held_bytes": {"hbm": 2**20, "ddr": 3 * 2**20},
            "moved_bytes_per_token": 2048.0,
        }
        for context in contexts
        for index, name in enumerate((policy, "full"))
    ]
    text = {"name": policy, "sha256": "0"}
    return {"model": policy, "dtype": "fp32", "device": "cpu", "places": 4, "text": text, "new_tokens": 8, "rows": rows}


def test_a_quality_page_shows_every_row() -> None:
    page = Document(quality_page(quality("shadowkv:budget_tokens=256,rank=16")))
    rows = page.table("Means with 95 % intervals")
    assert [row["policy"] for row in rows] == ["shadowkv:budget_tokens=256,rank=16", "full"] * 2
    assert [row["context"] for row in rows] == [2048, 2048, 4096, 4096]
    assert [row["HBM kept"] for row in rows] == [2**20] * 4
    assert [row["moved a token"] for row in rows] == [2048] * 4
    first, last = rows[0], rows[-1]
    assert list(first.values())[2:5] == ["0.0205 ±0.0100", "-0.0200 ±0.0050", "97.0% ±1.0%"]
    assert list(last.values())[2] == "0.1410"  # of a single place there is no interval
    assert "4 places of shadowkv" in page.text
    (figure,) = page.figures
    assert [line["name"] for line in figure["data"]] == ["shadowkv:budget_tokens=256,ra…", "full"]
    assert figure["data"][1]["y"] == pytest.approx([0.12048, 0.14096])
    assert figure["data"][0]["error_y"]["array"] == pytest.approx([0.01, 0])
    assert figure["layout"]["xaxis"]["tickvals"] == [2048, 4096]  # those that were measured


def test_an_interval_that_ends_at_a_limit_is_shown_from_end_to_end() -> None:
    document = quality("quest")
    document["rows"][0]["kl_nats"] |= {"mean": 0.02, "low": 0.0, "high": 0.19}
    page = Document(quality_page(document))
    assert page.table("Means with 95 % intervals")[0]["KL (nats)"] == "0.0200 (0.0000 to 0.1900)"
    error = page.figures[0]["data"][0]["error_y"]
    assert (error["array"][0], error["arrayminus"][0]) == pytest.approx((0.17, 0.02))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_on_a_quality_page_are_text(name: str) -> None:
    page, plain = Document(quality_page(quality(name))), Document(quality_page(quality("plain")))
    assert [tag for tag, _ in page.tags if tag != "wbr"] == [tag for tag, _ in plain.tags]
    assert len(page.scripts) == 3
    assert page.text.count(name) >= 4
    assert not any("<" in line["name"] for line in page.figures[0]["data"])


def test_plotly_knows_the_chart_of_quality() -> None:
    from plotly.graph_objects import Figure

    Figure(Document(quality_page(quality("quest"))).figures[0])


def test_what_a_template_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'measured' is undefined"):
        Page().html("quality", "title", {})


def test_only_our_own_text_is_trusted() -> None:
    """Everything is escaped but the scripts, whose hashes the page names, and the places where a name may break."""
    trusted = [
        line.strip()
        for path in sorted(TEMPLATES.iterdir())
        for line in path.read_text(encoding="utf-8").splitlines()
        if "|safe" in re.sub(r"\|(md|fenced)\|safe", "", line) or "autoescape" in line  # these escape for Markdown
    ]
    assert len(trusted) == 2
    assert trusted[0] == "<script>{{ script|safe }}</script>"
    assert """{{ own.text|e|replace(",", ",<wbr>"|safe)|replace(":", ":<wbr>"|safe) }}""" in trusted[1]


def test_templates_are_loaded_for_pages_alone() -> None:
    """And are in the package that is installed."""
    import tomllib

    root = Path(__file__).parents[2]
    code = "import sys, kvsim.report.report, kvsim.report.quality; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not {"jinja2", "plotly"} & set(done.stdout.split())
    globs = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["kvsim"]
    for path in TEMPLATES.iterdir():
        assert any(fnmatch(path.relative_to(root / "kvsim").as_posix(), glob) for glob in globs)


def test_figures_are_json_without_what_json_has_not() -> None:
    page = Page()
    page.chart("a", "b", {"data": [{"y": [float("nan"), float("inf"), 1.5]}], "layout": {}})
    html = page.html("quality", "", {}, measured="", policies=[], divergence=[], means=table("", ["x"], []))
    assert json.loads(Document(html).scripts[0])[0]["data"][0]["y"] == [None, None, 1.5]


def test_a_text_cell_is_left_aligned_and_a_missing_figure_a_dash() -> None:
    means = table("t", ["p", "n", "w"], [[name_cell("a"), number_cell(None, str), text_cell("x")]], ["w"])
    page = Document(Page().html("quality", "", {}, measured="", policies=[], divergence=[], means=means))
    assert page.table("t") == [{"p": "a", "n": "-", "w": "x"}]
    assert [given.get("class") for tag, given in page.tags if tag == "td"] == [None, "text"]
