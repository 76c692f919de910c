"""The worked examples run, in a shorter form, and their page is what the result that is kept says."""

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "worked_examples.json"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import worked_examples

    return worked_examples


def test_the_page_is_written_from_its_result(script: ModuleType) -> None:
    page = script.page(json.loads(RESULT.read_text(encoding="utf-8")))
    assert (ROOT / "docs" / "measured" / "worked_examples.md").read_text(encoding="utf-8") == page


def test_what_was_decided_follows_from_the_figures(script: ModuleType) -> None:
    kept = json.loads(RESULT.read_text(encoding="utf-8"))
    cached, plain = (next(row for row in kept["coding"]["plans"] if bool(row["options"]) is on) for on in (True, False))
    assert cached["gpus"] < plain["gpus"]
    fcfs, priority = kept["chat"]["plans"]
    assert priority["gpus"] < fcfs["gpus"]
    for row in (cached, plain, fcfs, priority):
        assert all(bound["value_s"] <= bound["limit_s"] for bound in row["slo"].values())
        assert row["fewer"] is not None  # one replica fewer was simulated, and breaks
    assert script._chat([priority, fcfs]).startswith("the plain queue")
    assert script._coding([{**cached, "gpus": plain["gpus"]}, plain]).startswith("no prefix cache")


def test_they_run(script: ModuleType) -> None:
    found = json.loads(json.dumps(script.measured(limit=12, minutes=0.1)))
    kept = json.loads(RESULT.read_text(encoding="utf-8"))
    assert kept.keys() == {"schema_version", "commit", *found}
    for part in ("coding", "chat"):
        assert found[part]["plans"][0].keys() == kept[part]["plans"][0].keys()
    assert [run["policy"] for run in found["long"]["runs"]] == [run["policy"] for run in kept["long"]["runs"]]
    assert all(run["finished"] == 12 for run in found["long"]["runs"])
    assert script.page({"commit": "abc", **found}).count("**Decided:**") == 3
