"""A program that compiles the loop beside a simulation: `python -m kvsim.engine.compile_beside PID FEATURES FOLDER`.

It reads the layouts of the state from standard input, keeps the code in the folder, and ends with the process that it
is for. Of several for one folder all but the first end at once, or, told to `wait`, when the first has ended.
"""

import fcntl
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from kvsim.engine.code_folder import CodeFolder
from kvsim.engine.state.layout import from_text
from kvsim.engine.state.words import length_in_words

_POLL_S = 0.2


def main(pid: int, features: tuple[str, ...], folder: Path, waits: bool = False) -> int:
    """Compile code with these features; 0 unless it could not be, is none that runs, or could not be kept."""
    layouts = sys.stdin.read()
    cluster, prices = map(from_text, layouts.splitlines())
    threading.Thread(target=_end_with, args=(pid,), daemon=True).start()
    with (folder / "compiling").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            return 0
        own = CodeFolder(folder, features)
        if own.read(layouts) is None:
            from kvsim.engine.compiled import compiled

            code = compiled(cluster, prices, features)
            if not _runs(code, length_in_words(cluster), length_in_words(prices)):
                return 1
            own.keep(code, layouts)
        return 0


def _runs(code: bytes, *words: int) -> bool:
    """Whether a fresh process, which has nothing of numba's, can load the code and call it."""
    command = [sys.executable, "-m", "kvsim.engine.machine_code", *map(str, words)]
    return subprocess.run(command, input=code, check=False).returncode == 0  # noqa: S603 - this program


def _end_with(pid: int) -> None:
    while True:
        try:
            os.kill(pid, 0)
        except OSError:
            os._exit(1)
        time.sleep(_POLL_S)


if __name__ == "__main__":
    gc.disable()  # what numba makes lives until it is done: looking for cycles took an eighth of the time
    given = sys.argv[1:]
    sys.exit(main(int(given[0]), tuple(filter(None, given[1].split("+"))), Path(given[2]), "wait" in given[3:]))
