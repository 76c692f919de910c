"""What befalls the program from outside: signals, kills, closed streams, a disk that is full or damaged."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow import parquet

from kvsim.__main__ import main

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KVSIM_KILLS", "5"))  # `make fuzz` asks for more
BASE = ("--trace", "azure-2023-code", "--model", "llama-3.1-8b", "--gpu", "h100-sxm")
LONG = ("--trace", "mooncake-conversation", *BASE[2:], "--gpus", "8", "--rate-scale", "3", "--fidelity", "op")
TWO = ("--policy", "full", "--policy", "quest")


class Program:
    """The program in a process group of its own; every process that it starts bears a mark."""

    def __init__(self, *args: str, **variables: str) -> None:
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, **variables, "KVSIM_TEST_MARK": self.mark}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvsim", *args],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[int]:
        """All that bear the mark and are no zombies."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def wait_for(self, condition: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Wait for a condition while the program runs."""
        end_s = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end_s
            time.sleep(0.02)

    def end(self) -> tuple[int, str, str]:
        """The exit code and what was printed."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def all_gone(self) -> bool:
        """Whether every process has ended, within some seconds."""
        end_s = time.monotonic() + 15
        while self.processes() and time.monotonic() < end_s:
            time.sleep(0.05)
        return not self.processes()


@pytest.fixture
def started() -> Iterator[Callable[..., Program]]:
    """Starts programs, and ends what is left of them."""
    programs: list[Program] = []

    def start(*args: str, **variables: str) -> Program:
        programs.append(Program(*args, **variables))
        return programs[-1]

    yield start
    for program in programs:
        for process in program.processes():
            os.kill(process, signal.SIGKILL)
        program.process.communicate()


def at_work(program: Program, seen: list[int] | None = None) -> Callable[[], bool]:
    """Whether two processes that simulate have spent some CPU time each; they are added to `seen`."""

    def seconds(process: int) -> float:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return int(fields[11]) / os.sysconf("SC_CLK_TCK")

    def busy() -> bool:
        others = [process for process in program.processes() if process != program.process.pid]
        simulate = [process for process in others if seconds(process) > 0.6]
        if seen is not None:
            seen[:] = simulate
        return len(simulate) >= 2

    return busy


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_process_outlives_the_program(number: int, started: Callable[..., Program], tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="k") as temporary:  # a path as short as addresses of sockets must be
        program = started("compare", *LONG, *TWO, "--out", str(tmp_path / "new"), TMPDIR=temporary)
        program.wait_for(at_work(program))
        program.process.send_signal(number)
        code, out, err = program.end()
        assert program.all_gone()
        assert list(Path(temporary).iterdir()) == []
    assert (code, out, err) == (-9 if number == signal.SIGKILL else 128 + number, "", "")
    if number != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []


def test_an_interruption_of_the_whole_group_leaves_partial_results(
    started: Callable[..., Program], tmp_path: Path
) -> None:
    program = started("compare", *LONG, *TWO, "--out", str(tmp_path), "--json")
    program.wait_for(at_work(program))
    os.killpg(program.process.pid, signal.SIGINT)  # as a terminal does
    code, out, err = program.end()
    assert (code, err) == (130, "interrupted: these are the results so far\n")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == json.loads(out)
    assert (summary["partial"], summary["missing"]) == (True, [])
    for run in summary["runs"]:
        assert run["partial"]
        assert 0 < run["requests"]["finished"] < run["requests"]["submitted"]
    assert "Interrupted: full is partial; quest is partial." in (tmp_path / "report.html").read_text()
    assert program.all_gone()


def test_a_process_that_is_killed_is_named(started: Callable[..., Program], tmp_path: Path) -> None:
    """As the kernel does to one that takes too much memory; the others end, and earlier results stay."""
    simulate: list[int] = []
    policies = ("--policy", "full", "--policy", "full")
    program = started("compare", *LONG, *policies, "--out", str(tmp_path / "new"))
    program.wait_for(at_work(program, simulate))
    os.kill(simulate[-1], signal.SIGKILL)
    code, out, err = program.end()
    assert (code, out) == (2, "")
    assert err == "error: policy full: its process was killed; is there enough memory?\n"
    assert program.all_gone()
    assert list(tmp_path.iterdir()) == []


def test_of_several_seeds_the_one_whose_process_is_killed_is_named(started: Callable[..., Program]) -> None:
    simulate: list[int] = []
    drawn = (
        "--trace",
        "servegen-deepseek-r1:span_s=600",
        *LONG[2:],
        "--policy",
        "quest",
        "--seed",
        "5",
        "--seeds",
        "2",
    )
    program = started("simulate", *drawn)
    program.wait_for(at_work(program, simulate))
    os.kill(simulate[0], signal.SIGKILL)
    code, _, err = program.end()
    assert code == 2
    assert err in [
        f"error: policy quest, seed {seed}: its process was killed; is there enough memory?\n" for seed in (5, 6)
    ]
    assert program.all_gone()


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_an_interruption_is_heard_while_processes_start(
    processes: int, started: Callable[..., Program], tmp_path: Path
) -> None:
    program = started("compare", *LONG, *TWO, "--out", str(tmp_path / "new"))
    program.wait_for(lambda: len(program.processes()) >= processes)
    os.killpg(program.process.pid, signal.SIGINT)
    code, _, err = program.end()
    assert code == 130
    assert "Traceback" not in err
    assert program.all_gone()
    assert list(tmp_path.glob("*/*")) == [] or (tmp_path / "new" / "summary.json").exists()


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, with their content, but for what is written aside."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".kvsim-" not in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def identity_of(out: Path) -> tuple[str, list[str]]:
    """The run ids of the set in a folder, after a check that all of its files, and no others, belong together."""
    found = files(out)
    summary = json.loads(found.pop("summary.json"))
    assert f'name="kvsim-run_id" content="{summary["run_id"]}"' in found.pop("report.html").decode()
    assert found.pop("notes.txt") == b"mine"
    for run in summary["runs"]:
        folder = run["inputs"]["policy"]
        assert json.loads(found.pop(f"{folder}/summary.json")) == run
        for name in ("requests.parquet", "series.parquet"):
            assert parquet.read_schema(out / folder / name).metadata[b"run_id"].decode() == run["run_id"]
            del found[f"{folder}/{name}"]
        trace = json.loads(found.pop(f"{folder}/trace.perfetto.json"))
        assert trace["otherData"]["run_id"] == run["run_id"]
    assert found == {}
    return summary["run_id"], [run["inputs"]["policy"] for run in summary["runs"]]


def test_a_comparison_killed_at_random_moments(started: Callable[..., Program], tmp_path: Path) -> None:
    out, small = tmp_path / "out", (*BASE, "--limit", "8", "--out", str(tmp_path / "out"))
    policies = (["full", "quest"], ["full", "snapkv"])
    flags = [[word for name in names for word in ("--policy", name)] for names in policies]
    assert main(["compare", *small, *flags[1]]) == 0
    (out / "notes.txt").write_text("mine")
    began_s = time.monotonic()
    program = started("compare", *small, *flags[0])
    assert program.end()[0] == 0
    whole_s = time.monotonic() - began_s
    before = identity_of(out)
    draw = random.Random(KILLS)
    for kill in range(KILLS):
        program = started("compare", *small, *flags[(kill + 1) % 2])
        if kill % 2:  # at any moment, and else while it writes
            time.sleep(draw.uniform(0.3, 1) * whole_s)
        else:
            end_s = time.monotonic() + 2 * whole_s
            while not list(tmp_path.glob(".kvsim-*")) and time.monotonic() < end_s:
                time.sleep(0.001)
            time.sleep(draw.expovariate(20))
        os.killpg(program.process.pid, signal.SIGKILL)
        program.end()
        after = identity_of(out)
        assert after[1] in policies
        assert after == before or after[1] == policies[(kill + 1) % 2]
        before = after
    assert main(["compare", *small, *flags[0]]) == 0
    assert identity_of(out)[1] == policies[0]
    assert [files(path) for path in tmp_path.glob(".kvsim-*")] == []


CASES = {
    "two policies": ("compare", *BASE, "--limit", "30", "--gpus", "2", *TWO),
    "seeds": (
        *("simulate", "--trace", "servegen-deepseek-r1:span_s=20", *BASE[2:]),
        *("--limit", "10", "--seeds", "2", "--policy", "shadowkv"),
    ),
    "operations": ("simulate", *BASE, "--limit", "6", "--fidelity", "op", "--perfetto", "0s-1s", "--policy", "infllm"),
    "sessions": (
        *("simulate", "--trace", "agentic-coding", *BASE[2:], "--limit", "12", "--sessions", "closed"),
        *("--session-kv", "swap", "--policy", "full"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_two_runs_write_the_same_bytes_but_for_their_timing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process and in another one, whatever the seed of hashes."""
    command = [sys.executable, "-m", "kvsim", *CASES[case], "--out", str(tmp_path / "other")]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert main([*CASES[case], "--out", str(tmp_path / "here")]) == 0
    capsys.readouterr()
    here, other = files(tmp_path / "here"), files(tmp_path / "other")
    assert sorted(here) == sorted(other)
    for name, content in here.items():
        if name.endswith("summary.json"):
            assert without_timing(content) == without_timing(other[name]), name
        else:
            assert content == other[name], name


def without_timing(summary: bytes) -> list[bytes]:
    """The lines of a summary but for the block of each run that says how long the simulator took."""
    lines = summary.splitlines()
    timing = [line for line in lines if line.strip().startswith((b'"wall_s": ', b'"cpu_s": ', b'"setup_cpu_s": '))]
    assert len(timing) == 3 * max(1, summary.count(b'"parameter_set"'))
    return [line for line in lines if line not in timing]
