"""The published schema of scenario files is the code's, and takes the files that the project has and makes."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest
import yaml

from kvsim.scenario.options import MISSING
from kvsim.scenario.scenario_file import OPTIONS
from kvsim.scenario.template import template

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs" / "scenario.schema.json"
LINE = "# yaml-language-server: $schema="
SCENARIOS = [path for path in sorted((ROOT / "examples").glob("*.yaml")) if path.read_text().startswith(LINE)]


def check(document: Any) -> None:
    fastjsonschema.compile(json.loads(SCHEMA.read_text(encoding="utf-8")))(document)


def test_it_is_current() -> None:
    text = runpy.run_path(str(ROOT / "scripts" / "options_page"))["schema_text"]()
    assert SCHEMA.read_text(encoding="utf-8") == text, "run scripts/options_page"


def test_it_describes_every_option() -> None:
    properties = json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]
    assert {key: one["description"] for key, one in properties.items()} == {one.key: one.help for one in OPTIONS}


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_examples_are_scenarios(path: Path) -> None:
    head = path.read_text(encoding="utf-8").partition("\n")[0]
    assert (path.parent / head.removeprefix(LINE)).resolve() == SCHEMA
    check(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_template_is_one_as_it_is_and_with_every_remark_in_force() -> None:
    text = template("scenario.yaml", "kvsim.schema.json", {})
    check(yaml.safe_load(text))
    keys = "|".join(one.key for one in OPTIONS if one.default is not MISSING)
    whole = yaml.safe_load(re.sub(rf"^#({keys}): ", r"\1: ", text, flags=re.MULTILINE))
    assert {one.key for one in OPTIONS} <= set(whole)
    check(whole)


def test_it_bites() -> None:
    for wrong in ({"gpuz": 1}, {"gpus": 0}, {"router": "nearest"}, {"slo": {"speed": 1}}):
        with pytest.raises(fastjsonschema.JsonSchemaValueException):
            check({"trace": "azure-2023-code", "model": "llama-3.1-8b", "gpu": "h100-sxm", **wrong})
