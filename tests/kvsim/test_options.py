"""Options stated once: flags, keys of scenario files, their schema and the page are the same ones and agree."""

import json
import runpy
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest
import typer
import yaml

from kvsim.__main__ import main
from kvsim.cli import simulate as command
from kvsim.cli.app import app
from kvsim.scenario import kinds
from kvsim.scenario.options import CACHE, GROUPS, Option, check_options, option, options_of
from kvsim.scenario.scenario_file import OPTIONS, Scenario, load_scenario, schema
from kvsim.scenario.setup import Setup

ROOT = Path(__file__).parents[2]
NEEDED = {"trace": "azure-2023-code", "model": "llama-3.1-8b", "gpu": "h100-sxm"}
# What a flag takes, and what a scenario file says for the same.
SAID: dict[str, tuple[list[str], Any]] = {
    "N": (["3"], 3),
    "K": (["3"], "3"),
    "X": (["2.5"], 2.5),
    "SHARE": (["0.25"], 0.25),
    "SIZE": (["2GiB"], 2 * 2**30),
    "TIME": (["1500ms"], 1.5),
    "FROM-TO": (["1s-2500ms"], [1, "2.5s"]),
    "": ([], True),
    "P|P,P,...": (["0.5,0.25"], [0.5, "0.25"]),
    "SHARE|NAME=SHARE,...": (["a=0.5,b=0.25"], {"a": "0.5", "b": 0.25}),
    "NAME=SHARE,...|FILE": (["miss=0.5,keep=0.25"], {"miss": 0.5, "keep": "0.25"}),
    "NAME=TIME,...": (["ttft=1s,tpot=50ms"], {"ttft": 1, "tpot": "50ms"}),
    "NAME:KEY=VALUE,...": (["a:weight=2,timeout=1m"], {"a": {"weight": 2, "timeout": 60}}),
    "NAME:LATENCY=TIME,...": (["chat:ttft=1s"], {"chat": {"ttft": 1.0}}),
    "POLICY": (["quest"], "quest"),
}


def said(one: Option) -> tuple[list[str], Any]:
    """A value of an option as flag and as key, other than its default."""
    if one.kind.choices:
        (other,) = [name for name in one.kind.choices if name != one.default][-1:]
        return [other], other
    return SAID.get(one.metavar, (["some"], "some"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Scenario]:
    """The scenarios that commands were asked for, which end there."""
    found: list[Scenario] = []

    def stop(self: Scenario) -> None:
        found.append(self)
        raise ValueError("stopped")

    monkeypatch.setattr(Scenario, "setups", stop)
    return found


@pytest.mark.parametrize("one", OPTIONS, ids=lambda one: one.key)
def test_a_flag_and_a_key_say_the_same(one: Option, asked: list[Scenario], tmp_path: Path) -> None:
    words, value = said(one)
    needed = [f"--{key}={text}" for key, text in NEEDED.items() if key != one.key]
    assert main(["simulate", *needed, one.flag, *words]) == 2
    file = tmp_path / "scenario.yaml"
    file.write_text(yaml.safe_dump({**NEEDED, one.key: value}))
    assert main(["simulate", "--scenario", str(file)]) == 2
    by_flag, by_file = asked
    kept = by_flag.setup if one.name in by_flag.setup else {one.name: getattr(by_flag, one.name)}
    assert kept[one.name] != one.default
    for own in fields(Scenario):
        assert getattr(by_flag, own.name) == getattr(by_file, own.name), own.name
    assert one.key in by_flag.given


def test_every_value_of_a_setup_but_what_is_built_is_an_option() -> None:
    built = {"model", "policy", "gpu", "host", "speculation"}
    assert {one.name for one in options_of(Setup)} == {field.name for field in fields(Setup)} - built
    for names in ([one.key for one in OPTIONS], [one.flag for one in OPTIONS]):
        assert len(names) == len(set(names))
    assert {one.group for one in OPTIONS} == set(GROUPS)


def test_commands_have_the_flags_of_all_options_in_their_groups() -> None:
    for name in ("simulate", "compare"):
        params = typer.main.get_command(app).commands[name].loaded.params
        panels = {param.opts[0]: param.rich_help_panel for param in params}
        own = {"--scenario", "--allow-code", "--schema", "--out", "--format", "--calibrate-from", "--json"}
        assert {flag: panel for flag, panel in panels.items() if flag not in own} == {
            one.flag: one.group for one in OPTIONS
        }


def test_an_option_is_a_line() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Kept:
        unrelated: int = 3
        scratch_memory_bytes: int = option(2**20, kinds.SIZE, CACHE, "Of each GPU.")
        most: int | None = option(None, kinds.WHOLE, CACHE, "At a time. Default: all.", least=1)
        order: str = option("first", kinds.choice(("first", "last")), CACHE, "Which goes.")
        wait_s: float | None = option(None, kinds.TIMEOUT, CACHE, "Before a load. Default: not at all.", flag="hold")

    size, _, _, wait = options_of(Kept)
    assert Kept().scratch_memory_bytes == 2**20
    assert (size.key, size.flag, size.default, size.default_words) == (
        "scratch_memory",
        "--scratch-memory",
        2**20,
        "1048576",
    )
    for kept in (Kept(), Kept(most=1, order="last")):
        check_options(kept)
    with pytest.raises(ValueError, match=r"^most=0 must be at least 1$"):
        check_options(Kept(most=0))
    with pytest.raises(ValueError, match=r"^unknown order 'lsat'; did you mean 'last'\? known: last, first$"):
        check_options(Kept(order="lsat"))
    assert (wait.key, wait.flag, wait.default_words, wait.metavar) == ("wait", "--hold", "", "TIME")


def test_a_command_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()


accepts = fastjsonschema.compile(schema())


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_the_schema_takes_the_examples(path: Path) -> None:
    accepts(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("one", OPTIONS, ids=lambda one: one.key)
def test_the_schema_takes_each_value_and_its_default(one: Option) -> None:
    accepts({one.key: said(one)[1]})
    if one.default is not MISSING:
        accepts({one.key: list(one.default) if isinstance(one.default, tuple) else one.default})


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpuz": 1},
        {"gpus": 1.5},
        {"gpus": 0},
        {"max_num_batched_tokens": 0},
        {"gpus": 10**9},
        {"seed": -1},
        {"policy": []},
        {"scheduler": "fcsf"},
        {"prefix_cache_ddr": -1},
        {"prefix_cache_prefetch": "yes"},
        {"slo": {"tfft": 1}},
        {"slo": {"ttft": 0}},
        {"slo_classes": {"chat": {}}},
        {"tenants": {"a": {"weigth": 2}}},
        {"tenants": {"a": 3}},
        {"counts": {"miss": [1]}},
        {"rate_scale": "fast"},
        {"timeout": 0},
    ],
    ids=str,
)
def test_the_schema_refuses_what_a_command_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(fastjsonschema.JsonSchemaValueException):
        accepts(wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        load_scenario({**NEEDED, **wrong}).setups()


def test_the_page_of_options_is_current() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "options_page"))["page"]()
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == page, "run scripts/options_page"
    assert all(f"`{one.flag}` | `{one.key}`" in page and one.help.split("|")[0] in page for one in OPTIONS)


def test_help_says_defaults_as_a_setup_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(group in text for group in GROUPS)
    assert text.count("Default: round-robin.") == 1
    assert command.replay.__doc__ == "Replay a trace of requests on a simulated cluster."
