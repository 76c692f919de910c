"""A sweep on a real Ray cluster: the same bytes as on this machine's processes, also when a worker is killed in it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvsim.__main__ import main
from kvsim.run.journal import Journal

ROOT = Path(__file__).parents[2]
WORKERS = 3
GRID = (
    *("--trace", "azure-2023-code", "--limit", "60", "--model", "llama-3.1-8b", "--gpu", "h100-sxm"),
    *("--over", "gpus=1,2", "--over", "max_num_seqs=1,2,4,8", "--over", "policy=full", "--over", "policy=quest"),
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of its own, with three workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = tmp_path_factory.mktemp("ray")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    flags = ("--head", "--block", f"--port={port}", f"--num-cpus={WORKERS}", "--include-dashboard=false")
    sockets = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # names of sockets are short
    place = ("--node-ip-address=127.0.0.1", f"--temp-dir={sockets}")
    with (logs / "head.log").open("w") as log:
        head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), "start", *flags, *place, "--disable-usage-stats"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        end_s = time.monotonic() + 120
        while "This command will now block" not in (logs / "head.log").read_text():
            assert head.poll() is None, (logs / "head.log").read_text()
            assert time.monotonic() < end_s
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(sockets, ignore_errors=True)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def workers_at_work() -> list[int]:
    """Processes of Ray's that do one of our tasks."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cmdline").read_bytes().startswith(b"ray::_answered"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_a_sweep_on_a_cluster_one_of_whose_workers_is_killed(cluster: str, tmp_path: Path) -> None:
    assert main(["sweep", *GRID, "--out", str(tmp_path / "here")]) == 0
    command = [sys.executable, "-m", "kvsim", "sweep", *GRID, "--ray", cluster, "--out", str(tmp_path / "there")]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = None
    while program.poll() is None:
        if killed is None and (at_work := workers_at_work()):
            killed = at_work[0]
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.005)
    out, err = program.communicate()
    assert program.returncode == 0, (out, err)
    assert killed is not None
    assert files(tmp_path / "there") == files(tmp_path / "here")


def test_what_a_cluster_did_goes_on_here(cluster: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["sweep", *GRID[:-4], "--policy", "full", "--ray", cluster, "--out", str(out)]) == 0
    with Journal(out / "sweep.journal") as journal:
        there = dict(journal.found)
    assert len(there) == 8
    assert main(["sweep", *GRID, "--out", str(out)]) == 0
    document = json.loads((out / "sweep.json").read_text())
    assert len(document["points"]) == 16
    with Journal(out / "sweep.journal") as journal:
        assert {key: journal.found[key] for key in there} == there
