"""A file appears whole or not at all, and what killed processes left of one goes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from traces.replacing import replacing


def write(path: Path, content: bytes) -> None:
    with replacing(path) as stream:
        stream.write(content)


def test_a_failure_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    write(path, b"old")
    with pytest.raises(TypeError), replacing(path) as stream:
        stream.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.npz"]


def test_what_killed_processes_left_goes_and_nothing_else(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = [".run.npz.tmp", ".run.npz.x.tmp", f".other.npz.{ended.pid}.tmp", f".run.npz.{os.getppid()}.tmp"]
    for name in (*mine, f".run.npz.{ended.pid}.tmp"):
        (tmp_path / name).write_text("half")
    write(tmp_path / "run.npz", b"new")
    assert {entry.name for entry in tmp_path.iterdir()} == {"run.npz", *mine}


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").readlink() == Path("file")
    assert (tmp_path / "file").read_bytes() == b"new"
    (tmp_path / "null").symlink_to("/dev/null")
    write(tmp_path / "null", b"gone")
    assert Path("/dev/null").is_char_device()
