"""YAML and JSON made to harm or to mislead: nesting, alias bombs, YAML 1.1's surprises, lone surrogates, no files."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvsim.__main__ import main
from kvsim.text.documents import DOCUMENT_BYTES, parse_json, parse_yaml
from kvsim.text.yaml_subset import MOST_CHARACTERS

SCENARIO = "trace: azure-2023-code\nlimit: 3\nmodel: llama-3.1-8b\ngpu: h100-sxm\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("12:30:45", "12:30:45"),
        ("1:30.5", "1:30.5"),
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
        ("010", "010"),
        ("=", "="),
        ("1_000", 1000),
        ("-5", -5),
        ("0x1f", 31),
        ("1.5", 1.5),
        ("2.5e+3", 2500.0),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("'12'", "12"),
        ("!!str 12", "12"),
        ("9" * 41, "9" * 41),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(f"key: {text}\n", "FILE")["key"]
    assert (found, type(found)) == (value, type(value))


def test_a_key_may_be_a_word_that_yaml_1_1_takes_for_a_flag() -> None:
    assert parse_yaml("{no: 1, on: 2, yes: 3}", "FILE") == {"no": 1, "on": 2, "yes": 3}


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 500 + "]" * 500, "FILE: line 1 nests deeper than 32 levels; write it flatter"),
        ("{a: " * 500 + "1" + "}" * 500, "FILE: line 1 nests deeper than 32 levels; write it flatter"),
        ("? " * 500 + "1", "FILE: line 1 nests deeper than 32 levels; write it flatter"),
        ("- " * 500 + "1", "FILE: line 1 nests deeper than 32 levels; write it flatter"),
        (BOMB, "FILE: it stands for more than 100,000 values once its aliases are written out"),
        ("a: &a [*a]", "FILE: line 1 refers to itself by an alias; write the value out"),
        ("a: &a {b: {c: *a}}", "FILE: line 1 refers to itself by an alias; write the value out"),
        ('a: "\\ud800"', "FILE: line 1 has a lone surrogate (\\ud800 to \\udfff); leave it out"),
        ('"\\udfff": 1', "FILE: line 1 has a lone surrogate (\\ud800 to \\udfff); leave it out"),
        ("a: !!binary aGk=", "FILE: line 1 has the tag 'tag:yaml.org,2002:binary'; leave it out"),
        ("a: !!python/name:os.system", "FILE: line 1 has the tag 'tag:yaml.org,2002:python/name:os.system'; leave it"),
        ("a: !!float 1:30", "FILE: line 1 has the tag 'tag:yaml.org,2002:float'; leave it out"),
        ("a: 1\na: 2", "FILE: the key 'a' stands twice, in lines 1 and 2; keep one of them"),
        ("? [1]\n: 2", "FILE is not YAML: "),
        ("- 1", "FILE holds no mapping of keys to values"),
        ("", "FILE holds no mapping of keys to values"),
        ("#" * (MOST_CHARACTERS + 1), "FILE has 262,145 characters; a YAML file here has at most 262,144"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse_yaml(text, "FILE")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "FILE: the key 'a' stands twice in one object; keep one of them"),
        ('{"b": {"a": 1, "a": 1}}', "FILE: the key 'a' stands twice in one object; keep one of them"),
        ("[" * 100_000, "FILE nests too deep; write it flatter"),
        ("9" * 5000, "FILE: '9999"),
        ('{"a": 1' + "0" * 60 + "}", "FILE: '1000"),
        ("{", "FILE is not JSON: "),
    ],
)
def test_json_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse_json(text, "FILE")
    assert str(error.value).startswith(message)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    code = main(args)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err.removesuffix("\n")


DOCUMENTS = {
    "scenario.yaml": ("simulate", "--scenario"),
    "gpu.yaml": ("explain", "--gpu"),
    "host.yaml": ("explain", "--host"),
    "config.json": ("model", "show"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file(
    make: Callable[[Path], None], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / name)
    error = refused(capsys, *DOCUMENTS[name], str(tmp_path / name))
    # A folder stands for the config.json in it.
    assert "not a file; name a regular file" in error or (name == "config.json" and "No such file" in error)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_file_too_large(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(DOCUMENT_BYTES + 1)
    assert "is larger than the 8,388,608 bytes of any file" in refused(capsys, *DOCUMENTS[name], str(tmp_path / name))


@pytest.mark.skipif(sys.platform == "win32", reason="needs /dev/fd")
def test_what_a_shell_opens_may_be_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """`--scenario <(command)` and `/dev/stdin`: their writer is the user's own."""
    reader, writer = os.pipe()
    os.write(writer, b"trace: t\nmodle: m\n")
    os.close(writer)
    try:
        error = refused(capsys, "simulate", "--scenario", f"/dev/fd/{reader}")
    finally:
        os.close(reader)
    assert error.startswith(f"error: /dev/fd/{reader}: ")
    assert "unknown key 'modle'; did you mean 'model'?" in error


OUTSIDE = """
from dataclasses import dataclass
from pathlib import Path
from policies import Full
Path("ran").touch()
@dataclass(frozen=True, kw_only=True, slots=True)
class Mine(Full):
    name = "mine"
"""


@pytest.mark.parametrize("policy", ["hostile_module:Mine", "[full, 'full@below=8k+hostile_module:Mine']"])
def test_a_scenario_file_runs_code_only_where_the_command_line_says_so(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile_module", raising=False)
    Path("hostile_module.py").write_text(OUTSIDE, encoding="utf-8")
    Path("s.yaml").write_text(f"{SCENARIO}gpus: 1\npolicy: {policy}\n", encoding="utf-8")
    assert refused(capsys, "compare", "--scenario", "s.yaml") == (
        "error: s.yaml: policy='hostile_module:Mine' runs the code of that module, which a file may do only when the "
        "command line says so: add --allow-code if you trust the file, or name the policy with --policy"
    )
    assert not Path("ran").exists()
    # Another fault stops the command after the policy has been read, so that nothing needs to be simulated.
    error = refused(capsys, "compare", "--scenario", "s.yaml", "--allow-code", "--tp", "3")
    assert error.startswith("error: gpus=1 is not a multiple of tp=3")
    assert Path("ran").exists()


def test_a_policy_of_the_command_line_is_the_user_s_own_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile_module", raising=False)
    Path("hostile_module.py").write_text(OUTSIDE, encoding="utf-8")
    Path("s.yaml").write_text(f"{SCENARIO}gpus: 1\npolicy: other:Other\n", encoding="utf-8")
    given = ("simulate", "--scenario", "s.yaml", "--policy", "hostile_module:Mine", "--tp", "3")
    assert refused(capsys, *given).startswith("error: gpus=1 is not a multiple of tp=3")
    assert Path("ran").exists()
    assert "--allow-code is of --scenario" in refused(capsys, "simulate", "--allow-code", "--policy", "full")


def test_a_config_with_a_mark_of_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Editors of Windows begin UTF-8 with a mark, which is no part of the JSON or YAML."""
    path = tmp_path / "config.json"
    path.write_text("\ufeff" + json.dumps({"model_type": "llama"}), encoding="utf-8")
    assert "is not JSON" not in refused(capsys, "model", "show", str(path))
