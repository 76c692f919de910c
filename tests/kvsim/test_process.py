"""Standard streams that are closed or full, and signals: an exit code and one line, never a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvsim.cli.process import in_order

ROOT = Path(__file__).parents[2]
FULL = "standard output: No space left on device"
CLOSED = "standard output is closed"


def shell(command: str) -> tuple[int, str, str]:
    """Exit code and output of the program where a shell has redirected its streams."""
    line = f'"{sys.executable}" -m kvsim {command}'
    done = subprocess.run(["/bin/sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("model list >&-", 1, f"error: {CLOSED}\n"),
        ("model list >&- 2>&-", 1, ""),
        ("model list <&- >&- 2>&-", 1, ""),
        ("model list >/dev/full", 1, f"error: {FULL}\n"),
        ("model list --json >/dev/full", 1, f"error: {FULL}\n"),
        ("model list >/dev/full 2>/dev/full", 1, ""),
        ("--help >/dev/full", 1, f"error: {FULL}\n"),
        ("model lst 2>&-", 2, ""),
        ("model lst 2>/dev/full", 2, ""),
        ("model lst >&-", 2, "error: No such command 'lst'. Did you mean 'list'?\n"),
        ("model list 2>&- >/dev/null", 0, ""),
        ("model list 2>/dev/full >/dev/null", 0, ""),
    ],
)
def test_streams_that_take_nothing(command: str, code: int, error: str) -> None:
    assert shell(command) == (code, "", error)


def test_results_are_written_though_nobody_reads_the_table(tmp_path: Path) -> None:
    run = "simulate --trace azure-2023-code --limit 3 --model llama-3.1-8b --gpu h100-sxm --policy full"
    for number, (redirected, error) in enumerate(((">/dev/full", FULL), (">&-", CLOSED))):
        out = tmp_path / str(number)
        assert shell(f"{run} --out {out} {redirected}") == (1, "", f"error: {error}\n")
        assert (out / "summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_was_begun(number: int) -> None:
    ended = []

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            ended.append(number)

    with pytest.raises(SystemExit) as end, in_order():
        work()
    assert (ended, end.value.code) == ([number], 128 + number)
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with in_order():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)


def test_no_file_is_taken_for_a_closed_stream(tmp_path: Path) -> None:
    script = "import os, kvsim.cli.process as p\nwith p.in_order():\n    print(os.open('x', os.O_CREAT), flush=True)"
    done = subprocess.run(
        ["/bin/sh", "-c", f'"{sys.executable}" -c "{script}" <&- 2>&-'],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert int(done.stdout) > 2
