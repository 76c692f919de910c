"""`kvsim sweep`: a row for each point, equal to a plain simulation; whatever kills it, the same bytes at the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from kvsim.__main__ import main

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KVSIM_KILLS", "3"))  # `make fuzz` asks for more
BASE = ("--trace", "azure-2023-code", "--limit", "30", "--model", "llama-3.1-8b", "--gpu", "h100-sxm")
GRID = ("--over", "gpus=1,2", "--over", "policy=full", "--over", "policy=quest:budget_tokens=512")


def swept(out: Path, *args: str) -> dict[str, Any]:
    assert main(["sweep", *BASE, *args, "--out", str(out)]) == 0
    return json.loads((out / "sweep.json").read_text())


def test_each_point_is_what_simulate_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = swept(tmp_path / "out", *GRID)
    assert "quest:budget_tokens=512" in capsys.readouterr().out
    assert [point["status"] for point in document["points"]] == ["done"] * 4
    for point in document["points"]:
        gpus, (policy,) = point["options"]["gpus"], point["options"]["policy"]
        assert main(["simulate", *BASE, "--gpus", str(gpus), "--policy", policy, "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert point["ttft_s.p99"] == alone["ttft_s"]["p99"]
        assert point["hbm->sm.bytes"] == alone["links"]["hbm->sm"]["bytes"]
        peaks = [held["peak_bytes"] for name, held in alone["memory"].items() if name.endswith(".hbm")]
        assert point["hbm.peak_bytes"] == sum(peaks)
    rows = parquet.read_table(tmp_path / "out" / "sweep.parquet").to_pylist()
    assert [row["point"] for row in rows] == [0, 1, 2, 3]
    assert [row["policy"] for row in rows[:2]] == ["full", "quest:budget_tokens=512"]
    assert [row["output_tokens_per_s"] for row in rows] == [p["output_tokens_per_s"] for p in document["points"]]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def keys(journal: Path) -> list[str]:
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return [json.loads(line.partition(b" ")[2])["key"] for line in lines]


def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    grid = ("--over", "gpus=1,2", "--over", "max_num_seqs=1,2,4,8", "--over", "policy=full", "--over", "policy=quest")
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = [sys.executable, "-m", "kvsim", "sweep", *BASE, *grid, "--out"]
    began_s = time.monotonic()
    subprocess.run([*command, str(whole)], cwd=ROOT, check=True, capture_output=True)
    whole_s = time.monotonic() - began_s
    draw, before = random.Random(KILLS), 0
    for _ in range(KILLS):
        program = subprocess.Popen(
            [*command, str(out)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(draw.uniform(0.2, 0.9) * whole_s)
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
        found = keys(out / "sweep.journal")
        assert len(found) == len(set(found)) >= before  # nothing is lost, nothing is found twice
        before = len(found)
    subprocess.run([*command, str(out)], cwd=ROOT, check=True, capture_output=True)
    assert files(out) == files(whole)


def test_points_that_are_known_are_not_simulated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(tmp_path / "out", *GRID)
    monkeypatch.setattr("kvsim.run.sweep._simulate", None)  # what a process would be asked to do
    before = files(tmp_path / "out")
    swept(tmp_path / "out", *GRID)
    assert files(tmp_path / "out") == before
    smaller = swept(tmp_path / "out", *GRID[:2], "--policy", "full")
    assert [point["options"] for point in smaller["points"]] == [{"gpus": 1}, {"gpus": 2}]
    assert len(keys(tmp_path / "out" / "sweep.journal")) == 2


def test_points_that_cannot_be_have_their_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = swept(tmp_path / "out", "--over", "tp=1,3,2", "--gpus", "2")
    assert [point["status"] for point in document["points"]] == ["done", "impossible", "done"]
    assert "tp=3" in document["points"][1]["reason"]
    assert "impossible: " in capsys.readouterr().out
    assert main(["sweep", *BASE, "--gpus", "2", "--over", "tp=3", "--out", str(tmp_path / "none")]) == 2
    assert "none of the 1 points can be simulated; the first: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--over", "gpus=1,2", "--gpus", "2"], "gpus is given as an option and as a dimension"),
        (["--over", "gpus=1", "--policy", "full", "--policy", "quest"], "make them a dimension: --over policy=full"),
        (["--over", "gpus=1", "--seeds", "3"], "make seeds a dimension: --over seed=0,1,2"),
        (["--over", "gpus=1", "--perfetto", "0s-1s"], "perfetto is no option of a sweep"),
        (["--over", "gpus=0"], "gpus=0"),
        (["--over", "scheduler=lottery"], "lottery"),
        (["--over", "gpus=1", "--ray", "127.0.0.1:1"], "--ray '127.0.0.1:1': nothing answers there"),
        (["--over", "gpus=1", "--ray", "nowhere"], "must be auto, HOST:PORT or ray://HOST:PORT"),
    ],
)
def test_what_is_refused(args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *BASE, *args, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "sweep.json").exists()
