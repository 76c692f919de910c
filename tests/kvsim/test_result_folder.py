"""A set of results takes the place of another whole: killed at any moment, refused, with others at work, anywhere."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killed_writer import MINE, NEW, OLD, content, earlier, fill, write_new

from kvsim.cli.process import in_order
from kvsim.results import folder_swap
from kvsim.results.folder import hold

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with earlier results and files of the user's."""
    fill(tmp_path / "out", {**OLD, **MINE})
    return tmp_path / "out"


def left_over(out: Path) -> list[Path]:
    """What was written aside and is still there."""
    return [*out.glob(".kvsim-*"), *out.parent.glob(".kvsim-*")]


@pytest.mark.parametrize("case", ["exchange", "current", "folders"])
def test_killed_at_every_step(case: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.killed_writer", str(tmp_path / "w"), case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert found["moments"] > 80
    # Exchanged in one step, there is no moment without a summary; else it is gone while files are moved.
    assert found["seen"] == (["new", "old"] if case == "exchange" else ["None", "new", "old"])


def test_nothing_is_left_and_what_is_not_ours_stays(out: Path) -> None:
    out.chmod(0o750)
    write_new(out)
    assert content(out) == {**NEW, **MINE}
    assert left_over(out) == []
    assert out.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("way", ["relative", "slash", "link", "inside", "dots"])
def test_any_way_to_name_the_folder(way: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out.parent / "link").symlink_to("out")
    monkeypatch.chdir(out if way == "inside" else out.parent)
    named = {"relative": "out", "slash": "out/", "link": "link", "inside": ".", "dots": "out/../out"}[way]
    here = Path.cwd().stat().st_ino
    write_new(Path(named))
    assert content(out) == {**NEW, **MINE}
    assert (out.parent / "link").readlink() == Path("out")
    assert Path.cwd().stat().st_ino == here  # nobody's current directory was taken away
    assert left_over(out) == []


def test_where_folders_cannot_be_exchanged(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_one: Path, _other: Path) -> None:
        raise OSError(22, "Invalid argument")  # as NFS says

    monkeypatch.setattr(folder_swap, "_rename_exchange", unsupported)
    write_new(out)
    assert content(out) == {**NEW, **MINE}
    assert left_over(out) == []


@pytest.mark.parametrize("copied", [False, True])
def test_a_mount_point(out: Path, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if copied:  # as with a bind mount, which nothing tells from a folder until a rename fails
        real = os.rename

        def across(source: str | Path, target: str | Path) -> None:
            if Path(source).parent == out.parent:
                raise OSError(18, "Invalid cross-device link")
            real(source, target)

        monkeypatch.setattr(os, "rename", across)
        monkeypatch.setattr(folder_swap, "_rename_exchange", lambda *_: across(out.parent / "x", out))
    else:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    write_new(out)
    assert content(out) == {**NEW, **MINE}
    assert left_over(out) == []


def test_a_full_disk_leaves_the_earlier_results(out: Path) -> None:
    script = "import pathlib, tests.killed_writer as k\n"
    script += "k.NEW['report.html'] = 'x' * 100_000\n"
    script += f"k.write_new(pathlib.Path({str(out)!r}))"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.stderr.splitlines()[-1] == f"OSError: {out}: the results cannot be written: File too large"
    assert content(out) == {**OLD, **MINE}
    assert left_over(out) == []


def test_a_disk_that_is_full_from_the_start(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"out: the results cannot be written: No space left on device"):
            write_new(out)
    assert content(out) == {**OLD, **MINE}
    assert left_over(out) == []


def test_what_was_killed_before_it_left_its_mark_is_removed(out: Path) -> None:
    for number in range(2):
        aside = out.parent / f".kvsim-762069bc07a6-{number}"
        aside.mkdir()
        if number:
            (aside / "kvsim.json").touch()
    write_new(out)
    assert left_over(out) == []


def test_two_at_once(out: Path) -> None:
    with hold(out, earlier) as held:
        with pytest.raises(ValueError, match="another kvsim is at work on the results of this folder"):
            write_new(out)
        held.replace(lambda folder: fill(folder, NEW))
        with pytest.raises(ValueError, match="another kvsim is at work"):  # on the folder that has come in its place
            write_new(out)
    assert content(out) == {**NEW, **MINE}
    write_new(out)


def test_what_others_left_beside_stays(out: Path) -> None:
    write_new(out)
    names = {"by_name": ".kvsim-0123456789ab-xyz", "by_mark": ".kvsim-762069bc07a6-other"}
    for name in names.values():
        (out.parent / name).mkdir()
        (out.parent / name / "kvsim.json").write_text('{"results_of": "other"}')
    (out.parent / ".kvsim-762069bc07a6-file").write_text("mine")
    write_new(out)
    assert {path.name for path in left_over(out)} == {*names.values(), ".kvsim-762069bc07a6-file"}


def test_what_is_changed_while_folders_are_exchanged_is_kept(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = folder_swap._rename_exchange

    def busy(one: Path, other: Path) -> None:
        (out / "late.txt").write_text("late")
        (out / "notes.new").write_text("edited")
        (out / "notes.new").replace(out / "notes.txt")  # as editors save
        real(one, other)

    monkeypatch.setattr(folder_swap, "_rename_exchange", busy)
    write_new(out)
    assert content(out) == {**NEW, **MINE, "notes.txt": "edited", "late.txt": "late"}
    assert left_over(out) == []


def test_a_folder_that_was_removed_meanwhile_comes_back(out: Path) -> None:
    with hold(out, earlier) as held:
        shutil.rmtree(out)
        held.replace(lambda folder: fill(folder, NEW))
        with pytest.raises(ValueError, match="another kvsim is at work"):
            write_new(out)
    assert content(out) == NEW


@pytest.mark.parametrize("case", ["exchange", "current"])
def test_a_signal_while_sets_are_swapped_comes_after_that(
    case: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "current":
        monkeypatch.chdir(out)
    real = folder_swap.finish
    signalled = []

    def signal_first(aside: Path, path: Path) -> None:
        if not signalled:
            signalled.append(case)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
        real(aside, path)

    monkeypatch.setattr(folder_swap, "finish", signal_first)
    with pytest.raises((SystemExit, KeyboardInterrupt)), in_order():
        write_new(out)
    assert signalled == [case]
    assert content(out) == {**NEW, **MINE}
    assert left_over(out) == []
