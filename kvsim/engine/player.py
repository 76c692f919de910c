"""Who plays the loop: the interpreter at once, and machine code from the moment on at which it is there and worth it.

State is arrays only, and both leave off between events, so that one goes on where the other stopped, to the bit. A run
that will last takes the code that an earlier one has kept; where there is none, a process beside this one compiles.
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvsim.engine.code_folder import CodeFolder, code_folders, make
from kvsim.engine.loop import play
from kvsim.engine.state.cluster import NOBODY, Cluster, Prices
from kvsim.engine.state.layout import layout_of, to_text
from policies.shown import shown

# Loading code that is kept takes some 0.1 CPU seconds, compiling the core some 20 (docs/measured/start.md). A run that
# would be over before gains nothing from either.
LOAD_S = 0.1
COMPILE_S = 20.0
# Before a request has left: what the interpreter takes for one, about half of what it does at a few hundred tokens a
# request (docs/measured/start.md), and for how long that is believed.
REQUEST_S, _BELIEVED_S = 0.5e-3, 1.0
_SLICE_S = 0.05  # between two looks at whether to change over
_LOOK_AGAIN_S = 0.5

_codes: dict[tuple[str, ...], Any] = {}  # that this process has loaded, by features
_compilers: list[subprocess.Popen[bytes]] = []  # that it has started: they may outlast the run that they were for


class Player:
    """Plays the events of one simulation of so many requests, of which this process makes about so many (`runs`)."""

    def __init__(self, features: tuple[str, ...], requests: int, runs: int = 1) -> None:
        self._features, self._requests, self._runs = features, requests, runs
        self._when = _when()
        self._code: Any = None
        self._bound: tuple[Any, ...] = ()
        self._events, self._spent_s, self._look_s = 50, 0.0, 0.0
        self._layouts = ""
        self._compiler: subprocess.Popen[bytes] | None = None
        self._hopeless = False

    def play(self, cluster: Cluster, prices: Prices, most_events: int) -> bool:
        """Let events happen, at most so many; False when nothing is left to happen. May make detours."""
        self._code = self._code or self._loaded()
        if self._code is None and self._when == "first":
            self._compile_first(cluster, prices)
        if self._code is None and self._when == "beside" and self._spent_s >= self._look_s:
            self._change_over(cluster, prices)
        if self._code is None:
            return self._interpret(cluster, prices, most_events)
        state = self._bind(cluster, prices)
        return bool(self._code.play(*state, NOBODY, 0.0, most_events))

    def _interpret(self, cluster: Cluster, prices: Prices, most_events: int) -> bool:
        began_s = time.thread_time()
        try:
            with _undisturbed():
                goes_on = play(cluster, prices, NOBODY, 0.0, min(self._events, most_events))
            took_s = time.thread_time() - began_s
            self._events = self._events * 2 if took_s < _SLICE_S / 2 else max(1, int(self._events * _SLICE_S / took_s))
        finally:  # detours are many at first
            self._spent_s += time.thread_time() - began_s
        return goes_on

    def _change_over(self, cluster: Cluster, prices: Prices) -> None:
        """Load code if that is there and the run will last; have it compiled if it will last for long."""
        left = int(cluster.replicas["left"].sum())
        if left:
            remaining_s = self._spent_s * (self._requests - left) / left
        else:
            remaining_s = self._requests * REQUEST_S if self._spent_s < _BELIEVED_S else math.inf
        self._look_s = self._spent_s + (_LOOK_AGAIN_S if left or self._spent_s > _LOOK_AGAIN_S else _SLICE_S)
        remaining_s += (self._runs - 1) * self._requests * REQUEST_S
        if remaining_s < LOAD_S:
            return
        folders = code_folders(self._features)
        self._layouts = self._layouts or _layouts(cluster, prices)
        for folder in folders:
            self._code = _load(folder, self._layouts)
            if self._code is not None:
                return
        if remaining_s > COMPILE_S and not self._hopeless:
            self._compile(folders[0])

    def _compile_first(self, cluster: Cluster, prices: Prices) -> None:
        folder, *_ = code_folders(self._features)
        layouts = _layouts(cluster, prices)
        self._code = _load(folder, layouts)
        if self._code is None and make(folder):
            _compile_beside(folder, layouts, "wait").wait()
            self._code = _load(folder, layouts)
        if self._code is None:
            raise OSError(f"the simulator cannot be compiled, or not be kept in {folder.path}")

    def _compile(self, folder: CodeFolder) -> None:
        """Have code compiled, if nobody does so yet; say so where that has failed."""
        if self._compiler is None and any(one.poll() is None for one in _compilers):
            return  # for the run before this one
        if self._compiler is None and make(folder):
            self._compiler = _compile_beside(folder, self._layouts)
            _compilers[:] = [*(one for one in _compilers if one.poll() is None), self._compiler]
        elif self._compiler is None or self._compiler.poll():
            self._hopeless = True
            sys.stderr.write(
                f"warning: the simulator cannot be compiled, or not be kept in {folder.path}: this run is interpreted "
                "to its end, some fifty times as slow; make room, or name a folder in the environment's "
                "NUMBA_CACHE_DIR\n"
            )

    def _loaded(self) -> Any:
        """The code that this process has already, with the fewest features beyond those of this simulation."""
        able = [features for features in _codes if set(self._features) <= set(features)]
        return _codes[min(able, key=len)] if able and self._when != "never" else None

    def _bind(self, cluster: Cluster, prices: Prices) -> tuple[Any, Any]:
        """The state as the code takes it, laid out anew where an array has been replaced."""
        if not (self._bound and self._bound[0] is cluster and self._bound[1] is prices):
            self._bound = cluster, prices, *self._code.references(cluster, prices)
        return self._bound[2], self._bound[3]


def _when() -> str:
    """When to compile: `first`, `never`, or `beside` a run that lasts, which is what people want.

    ValueError for anything else in the environment's KVSIM_COMPILE.
    """
    when = os.environ.get("KVSIM_COMPILE") or "beside"
    if when not in ("first", "beside", "never"):
        raise ValueError(f"KVSIM_COMPILE: {shown(when)} must be first, beside or never")
    return "never" if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0") else when


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What a signal raises comes between two events, not in the midst of one, as if they were machine code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former, heard = signal.getsignal(signal.SIGINT), []
    if not callable(former):
        yield
        return
    signal.signal(signal.SIGINT, lambda *given: heard.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if heard:
            former(*heard[0])


def _layouts(cluster: Cluster, prices: Prices) -> str:
    return f"{to_text(layout_of(cluster))}\n{to_text(layout_of(prices))}"


def _load(folder: CodeFolder, layouts: str) -> Any:
    """The code that is kept in a folder, for a state of these layouts; None where there is none for this process."""
    code = folder.read(layouts)
    if code is None:
        return None
    from kvsim.engine.machine_code import MachineCode

    try:
        _codes[folder.features] = MachineCode(code)
    except RuntimeError:  # it calls what is not here
        return None
    return _codes[folder.features]


def _compile_beside(folder: CodeFolder, layouts: str, *options: str) -> subprocess.Popen[bytes]:
    """Start a process that compiles, unless one does so already, and that ends with the program at the latest."""
    import multiprocessing

    program = multiprocessing.parent_process()
    pid = os.getpid() if program is None or program.pid is None else program.pid
    arguments = [str(pid), "+".join(folder.features), str(folder.path.absolute()), *options]
    with tempfile.TemporaryFile() as given:
        given.write(layouts.encode())
        given.seek(0)
        return subprocess.Popen(  # noqa: S603 - this program
            [sys.executable, "-m", "kvsim.engine.compile_beside", *arguments],
            stdin=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_FAST},
            cwd=Path(__file__).parents[2],  # where `kvsim` is found
        )


# What numba optimizes: less than it could, for code that is as fast (0.042 s for 2,000 requests) in half the time.
_FAST = {
    "NUMBA_OPT": "1",
    "NUMBA_LOOP_VECTORIZE": "0",
    "NUMBA_SLP_VECTORIZE": "0",
    "NUMBA_LLVM_REFPRUNE_PASS": "0",  # nothing is counted
}
