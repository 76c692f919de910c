"""A program that compiles the loop beside a simulation: `python -m kvsim.engine.compile_beside PID FEATURES FOLDER`.

It reads the layouts of the state from standard input, keeps the code in the folder, and ends with the process that it
is for. Of several for one folder all but the first end at once.
"""

import fcntl
import os
import sys
import threading
import time
from pathlib import Path

from kvsim.engine.code_folder import CodeFolder
from kvsim.engine.state.layout import from_text

_POLL_S = 0.2


def main(pid: int, features: tuple[str, ...], folder: Path) -> int:
    """Compile code with these features; 0 unless it could not be kept."""
    cluster, prices = map(from_text, sys.stdin.read().splitlines())
    threading.Thread(target=_end_with, args=(pid,), daemon=True).start()
    with (folder / "compiling").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        own = CodeFolder(folder, features)
        if not own.is_ready:
            from kvsim.engine.compiled import Code

            own.declare(ready=Code(cluster, prices, features, folder).compile())
        return int(not own.is_ready)


def _end_with(pid: int) -> None:
    while True:
        try:
            os.kill(pid, 0)
        except OSError:
            os._exit(1)
        time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), tuple(filter(None, sys.argv[2].split("+"))), Path(sys.argv[3])))
