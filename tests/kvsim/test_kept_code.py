"""Compiled code on disk: damaged, unreadable or unwritable, it costs a compilation and never a run."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from numba.core import event

from kvsim.engine.kept_code import _CALLBACK

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os
import sys
from pathlib import Path
import numba
from kvsim.engine.kept_code import is_kept, keep, kept

def double(x):
    return x * FACTOR

compiled = numba.njit(double)
keep(compiled, Path(os.environ["NUMBA_CACHE_DIR"]) / FOLDER)
found = kept(compiled, (numba.int64,))
print(compiled(21), "found" if found else "compiled", "kept" if is_kept(compiled) else "not kept")
"""


class Compiler:
    """A program that compiles one small function, and where it keeps that."""

    def __init__(self, folder: Path) -> None:
        self.program, self.cache = folder / "program.py", folder / "cache"
        self.write(2)

    def write(self, factor: int) -> None:
        """Write the program, with this factor in what is compiled."""
        self.program.write_text(PROGRAM.replace("FACTOR", str(factor)).replace("FOLDER", repr(str(factor))))

    def run(self, **options: object) -> tuple[str, str]:
        """What it prints, and what it says on standard error."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(self.cache)}
        environment.pop("NUMBA_DISABLE_JIT", None)
        command = [sys.executable, str(self.program)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    def file(self, suffix: str) -> Path:
        """The one file of a kind."""
        (path,) = self.cache.rglob(f"*.{suffix}")
        return path


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    """One that has compiled already."""
    made = Compiler(tmp_path)
    assert made.run() == ("42 compiled kept", "")
    return made


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(path: Path) -> None:
    path.write_bytes(b"no code at all" * 100)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_what_is_damaged_is_compiled_anew_once(suffix: str, compiler: Compiler) -> None:
    damages: list[Callable[[Path], None]] = [halve, empty, flip, replace, Path.unlink]
    for damage in damages:
        damage(compiler.file(suffix))
        assert compiler.run() == ("42 compiled kept", ""), damage
    assert compiler.run() == ("42 found kept", "")


def test_what_cannot_be_written_is_said_once_and_done_without(compiler: Compiler) -> None:
    folder(compiler.file("nbi"))
    out, err = compiler.run()
    assert out == "42 compiled not kept"
    assert err.count("\n") == 1
    assert err.startswith(
        f"warning: the compiled simulator cannot be kept in {compiler.file('nbi').parent} (Is a directory)"
    )


def test_a_full_disk(tmp_path: Path) -> None:
    import resource

    made = Compiler(tmp_path)
    out, err = made.run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    assert out == "42 compiled not kept"
    assert "(File too large)" in err
    assert not list(made.cache.rglob("*.tmp.*"))
    assert made.run() == ("42 compiled kept", "")


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    made = Compiler(tmp_path)
    made.cache.write_text("in the way")
    out, err = made.run()
    assert out == "42 compiled not kept"
    assert err.startswith(f"warning: the compiled simulator cannot be kept in {made.cache}/2 (Not a directory)")


def test_code_of_another_source_is_not_used(compiler: Compiler) -> None:
    former = compiler.file("nbc")
    compiler.write(3)
    assert compiler.run()[0] == "63 compiled kept"
    other = next((compiler.cache / "3").glob("*.nbc"))
    other.write_bytes(former.read_bytes())  # as when a process is killed between its index and its data
    assert compiler.run()[0] == "63 compiled kept"


def test_many_at_once(tmp_path: Path) -> None:
    made = Compiler(tmp_path)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(made.run()[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {text.split()[0] for text in found} == {"42"}
    assert made.run() == ("42 found kept", "")


def test_what_a_killed_process_left_is_removed(compiler: Compiler) -> None:
    index = compiler.file("nbi")
    old, new = (index.with_name(f"{index.name}.tmp.{name}") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    empty(index)
    assert compiler.run() == ("42 compiled kept", "")
    assert (old.exists(), new.exists()) == (False, True)


def test_an_interruption_within_a_callback_of_the_compiler_is_not_lost() -> None:
    raised_within = []
    callback = ModuleType("callback")
    source = f"def {_CALLBACK}(press, note):\n    try:\n        press()\n        sum(range(1000))\n"
    source += "    except KeyboardInterrupt:\n        note()\n"
    exec(source, vars(callback))  # noqa: S102 - a function of the name that numba's has

    def compile_for_a_while() -> None:
        vars(callback)[_CALLBACK](lambda: signal.raise_signal(signal.SIGINT), lambda: raised_within.append(True))
        end_s = time.monotonic() + 10
        while time.monotonic() < end_s:
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt), event.trigger_event("numba:compile"):
        compile_for_a_while()
    assert raised_within == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
