"""Pages of docs/measured/ are what their scripts write from the results that are kept, and the scripts run."""

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
NAMES = [
    "aiconfigurator",
    "attention_on_sms",
    "batching",
    "decode_overhead",
    "fidelities",
    "parallelism",
    "prefix_caches",
    "session_kv",
    "sparse_prefill",
    "speculation",
    "tenants",
]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.docs_tables import pages

    return pages


def test_every_page_is_known(pages: ModuleType) -> None:
    assert sorted(pages.PAGES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_written_from_its_result(pages: ModuleType, name: str) -> None:
    how = f"run python -m benchmarks.docs_tables --pages {name} and commit what it writes"
    result = json.loads(pages.result_of(name).read_text(encoding="utf-8"))
    assert pages.page_of(name).read_text(encoding="utf-8") == pages.PAGES[name](result), how


@pytest.mark.parametrize("name", ["batching", "parallelism", "prefix_caches", "session_kv", "tenants"])
def test_a_table_is_measured(pages: ModuleType, name: str) -> None:
    """On a few requests: what comes of it is plain JSON, has the shape of what is kept, and makes a page."""
    measured = json.loads(json.dumps(pages.TABLES[name].measure(12)))
    kept = json.loads(pages.result_of(name).read_text(encoding="utf-8"))
    assert {"schema_version", "commit", *measured} == kept.keys()
    assert _shape(measured) == _shape({key: kept[key] for key in measured})
    page = pages.PAGES[name]({"commit": "abc", **measured})
    assert f"`benchmarks/results/{name}.json` (commit\nabc)" in page or "(commit abc)" in page
    assert page.count("\n| ") > 4


def _shape(value: object) -> object:
    """Keys and kinds of a result, of lists those of the first row; names of clients and how many rows aside."""
    if isinstance(value, dict):
        return (
            {"client": ""}
            if any(str(key).startswith("client-") for key in value)
            else {key: _shape(inner) for key, inner in value.items()}
        )
    if isinstance(value, list):
        return [_shape(value[0])] if value else []
    return "number" if value is None or isinstance(value, int | float) else type(value).__name__


def test_what_figures_do_not_show_is_not_said(pages: ModuleType) -> None:
    from benchmarks.docs_tables.markdown import holding, paragraph, share, table

    assert holding((True, "One."), (False, "Two."), (True, "Three.")) == ["One.", "Three."]
    assert [share(0.003), share(0.034), share(0.5)] == ["0.3 %", "3.4 %", "50 %"]
    assert table(("a", "b"), [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"
    text = "word " * 23 + "exit 130. Then it goes on, - and on."
    assert [line.split()[0] for line in paragraph(text).splitlines()] == ["word", "Then"]
    assert paragraph("a " * 80, item=True).splitlines()[1].startswith("  a")
