"""`kvsim init`: its file says every option, and is the scenario that a command line of the same options is."""

import json
from pathlib import Path

import fastjsonschema
import pytest
import yaml

from kvsim.__main__ import main
from kvsim.scenario.scenario_file import OPTIONS, load_scenario
from kvsim.scenario.template import FIRST

GIVEN = ("--gpus", "4", "--policy", "full", "--policy", "quest:budget_tokens=512", "--slo", "ttft=1s,tpot=50ms")
FURTHER = ("--prefix-cache-ddr", "1TiB", "--tenant", "a*:weight=2", "--counts", "miss=0.3", "--skip-bad-rows")


def test_a_new_file_is_the_scenario_of_its_options(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    assert main(["init", str(file), *GIVEN, *FURTHER]) == 0
    asked = load_scenario({}, file)
    said = {"gpus": 4, "policy": ["full", "quest:budget_tokens=512"], "slo": {"ttft": "1s", "tpot": "50ms"}}
    further = {"prefix_cache_ddr": "1TiB", "tenants": {"a*": {"weight": 2}}, "counts": {"miss": 0.3}}
    expected = load_scenario({**FIRST, **said, **further, "skip_bad_rows": True})
    assert asked == expected
    schema = json.loads((tmp_path / "kvsim.schema.json").read_text())
    fastjsonschema.compile(schema)(yaml.safe_load(file.read_text()))
    assert file.read_text().startswith("# yaml-language-server: $schema=kvsim.schema.json\n")


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=[one.key for one in OPTIONS])
def test_taking_a_remark_s_mark_away_changes_nothing(number: int, tmp_path: Path) -> None:
    file, one = tmp_path / "scenario.yaml", OPTIONS[number]
    assert main(["init", str(file)]) == 0
    text = file.read_text()
    plain = load_scenario({}, file)
    assert text.count(f"\n#{one.key}: ") + text.count(f"\n{one.key}: ") == 1
    file.write_text(text.replace(f"\n#{one.key}: ", f"\n{one.key}: "))
    changed = load_scenario({}, file)
    assert (changed.setup, changed.resolved()) == (plain.setup, plain.resolved())


def test_the_first_scenario_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scenario.yaml"
    assert main(["init", str(file)]) == 0
    assert main(["simulate", "--scenario", str(file), "--limit", "20", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["requests"]["finished"] == 20


def test_what_exists_is_left_and_bad_options_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scenario.yaml"
    file.write_text("mine")
    assert main(["init", str(file)]) == 2
    assert "exists, and is left as it is" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert main(["init", str(tmp_path / "new.yaml"), "--scheduler", "lottery"]) == 2
    assert main(["init", str(tmp_path / "missing" / "new.yaml")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenario.yaml"]
