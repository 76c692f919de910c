"""What every command shares: exit codes, one-line errors, help, and JSON that any reader accepts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from kvsim.__main__ import main
from kvsim.cli import TargetUnmet
from kvsim.cli.output import print_facts, print_json, print_table
from kvsim.version import __version__

ROOT = Path(__file__).parents[2]


def run(*args: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    command = [sys.executable, *python, "-m", "kvsim", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def failing(error: BaseException) -> object:
    """A stand-in that raises `error` whatever it is called with."""

    def fail(*_args: object) -> NoReturn:
        raise error

    return fail


def test_the_program_runs_as_a_module() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kvsim {__version__}\n", "")


@pytest.mark.parametrize("args", [[], ["model"], ["trace"], ["hardware"]])
def test_no_command_prints_the_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert "Usage: kvsim" in out
    assert err == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["modle"], "error: No such command 'modle'. Did you mean 'model'?\n"),
        (["model", "lst"], "error: No such command 'lst'. Did you mean 'list'?\n"),
        (["model", "list", "--jsno"], "error: No such option: --jsno (Possible options: --json)\n"),
        (["model", "show"], "error: Missing argument 'MODEL'.\n"),
    ],
)
def test_wrong_usage_names_the_nearest(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert capsys.readouterr() == ("", message)


def test_a_missing_file_is_named() -> None:
    done = run("model", "show", "no/such/config.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no/such/config.json: No such file or directory\n"


def test_developers_get_the_traceback() -> None:
    done = run("model", "show", "no/such/config.json", python=("-X", "dev"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("rank=0\n  must be at least 1"), 2, "error: rank=0 must be at least 1\n"),
        (PermissionError(13, "Permission denied", "a.json"), 2, "error: a.json: Permission denied\n"),
        (OSError("the disk is full"), 2, "error: the disk is full\n"),
        (TargetUnmet("ttft_p99 is 12 s at best"), 3, "error: ttft_p99 is 12 s at best\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("kvsim.models.model_names", failing(error))
    assert main(["model", "list"]) == code
    assert capsys.readouterr() == ("", message)


def test_a_bug_is_not_taken_for_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsim.models.model_names", failing(KeyError("layers")))
    with pytest.raises(KeyError):
        main(["model", "list"])


def test_a_reader_that_goes_away_causes_no_complaint() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "kvsim", "model", "list", "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


def test_json_has_a_version_and_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [np.float64("inf"), np.int64(3)], "c": {7: np.array([1.5, np.nan])}, "d": None})
    expected = {"schema_version": 1, "a": None, "b": [None, 3], "c": {"7": [1.5, None]}, "d": None}
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == expected


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"name": "left", "size": "right"}, [["[red]a[/red]", "1"], ["b" * 100, "20"]])
    print_facts("[bold]title", {"x": "[y]"})
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["[red]a[/red]", "1"] for line in lines)
    assert any(line.split() == ["b" * 100, "20"] for line in lines), "a pipe has no width to cut lines at"
    assert lines[-2:] == ["[bold]title", "  x  [y]"]


def test_model_list_and_show_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "list", "--json"]) == 0
    listed = {model["name"]: model for model in json.loads(capsys.readouterr().out)["models"]}
    assert main(["model", "show", "llama-3.1-8b", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert listed["llama-3.1-8b"].items() <= shown.items()
    # 32 layers, keys and values of 8 heads of 128 elements, 2 bytes each.
    per_token = 32 * 2 * 8 * 128 * 2
    assert shown["kv_bytes_per_token"] == per_token
    assert shown["kv_bytes"] == {str(tokens): tokens * per_token for tokens in (4096, 32768, 131072, 1048576)}
    (group,) = shown["layer_groups"]
    assert (group["kind"], group["layers"], group["heads"], group["kv_heads"]) == ("full", 32, 32, 8)


def test_model_show_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "show", "llama-3.1-8b"]) == 0
    out = capsys.readouterr().out
    assert "8,030,261,248" in out  # the published count
    assert "KV at 128Ki tokens  16 GiB" in out  # 131,072 tokens of 131,072 bytes


def test_an_unknown_model_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "show", "llama-3.1-8bb"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown model 'llama-3.1-8bb'; did you mean 'llama-3.1-8b'? known: llama-3.1-8b, ")
    assert error.count("\n") == 1
