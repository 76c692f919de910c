"""The tutorial's commands run from the first to the last, each on a few requests, in an empty folder."""

import json
import re
import shlex
from pathlib import Path

import pytest

from kvsim.__main__ import main

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
REQUESTS = "15"


def commands() -> list[list[str]]:
    """The words after `kvsim` of each command, with few requests in place of as many as the page has."""
    blocks = FENCE.findall(PAGE.read_text(encoding="utf-8"))
    text = "\n".join(block for name, block in blocks if not name).replace("\\\n", " ")  # `sh` needs more than kvsim
    found = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("kvsim ")]
    return [
        [REQUESTS if before == "--limit" else word for before, word in zip(["", *one], one, strict=False)]
        for one in found
    ]


def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    asked = commands()
    assert [one[0] for one in asked] == ["trace", "trace", "simulate", "simulate", "plan", "plan", "sweep"]
    for words in asked:
        assert main(words) == 0, words
        assert capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "plan" / "plan.json").read_text(encoding="utf-8"))["answer"]
    for name in ("one/report.html", "one/summary.json", "plan/report.html", "sweep/sweep.parquet"):
        assert (tmp_path / "out" / name).is_file(), name
