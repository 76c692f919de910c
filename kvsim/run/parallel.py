"""A few simulations beside each other, which show how far they are and which Ctrl-C ends early but in order."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from ctypes import c_bool, c_longlong
from typing import Any, ClassVar, NamedTuple

from kvsim.results.summary import Result
from kvsim.run.jobs import Job, answer, run

_POLL_S = 0.1

Show = Callable[[Sequence[int]], None]
"""Is told, now and then, how many requests have left each simulation."""


class Outcome(NamedTuple):
    """Results by the index of their job; after an interruption partial ones, without jobs that had not begun."""

    results: dict[int, Result]
    interrupted: bool


class Board(NamedTuple):
    """What processes share: for each job, how many requests have left and whether it began; whether all shall stop."""

    left: Any
    began: Any
    stop: Any


def simulate_all(jobs: Sequence[Job], show: Show) -> Outcome:
    """Do every job, at most as many at a time as there are processors.

    The first Ctrl-C ends simulations that have begun at their next event boundary, and the others at once; where none
    has begun, and at a second one, KeyboardInterrupt is raised. Raises ValueError for a simulation that cannot run, and
    OSError where the process of one was killed, with the name of its job when there are several; the others end.
    """
    board = Board((c_longlong * 1)(), (c_bool * 1)(), c_bool()) if len(jobs) == 1 else _shared_board(len(jobs))
    with _stopping(board):
        results = {0: _simulate(jobs[0], 0, board, show)} if len(jobs) == 1 else _simulate_beside(jobs, board, show)
    return Outcome(results, bool(board.stop.value))


def _shared_board(jobs: int) -> Board:
    from multiprocessing.sharedctypes import RawArray, RawValue

    return Board(RawArray(c_longlong, jobs), RawArray(c_bool, jobs), RawValue(c_bool))


@contextmanager
def _stopping(board: Board) -> Iterator[None]:
    """Ctrl-C sets `stop`: an exception in the midst of an event would leave the simulation's books unbalanced."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def handle(*_: object) -> None:
        if board.stop.value or not any(board.began):
            raise KeyboardInterrupt
        board.stop.value = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _simulate(job: Job, index: int, board: Board, show: Show | None = None) -> Result:
    def progress(gone: int) -> None:
        board.began[index] = True
        board.left[index] = gone
        if show:
            show(board.left)
        if board.stop.value:
            raise KeyboardInterrupt  # between two events, where `simulate` takes it

    return run(job, progress)


def _simulate_beside(jobs: Sequence[Job], board: Board, show: Show) -> dict[int, Result]:
    from kvsim.run.executor import Processes

    waiting = list(enumerate(jobs))
    tasks: dict[Future[Result], int] = {}
    results: dict[int, Result] = {}
    with Processes(min(len(jobs), os.cpu_count() or 1), _Here.know, *board) as executor:
        while tasks or (waiting and not board.stop.value):
            while waiting and executor.free and not board.stop.value:
                index, job = waiting.pop(0)
                tasks[executor.submit(_simulate_here, job, index)] = index
            if board.stop.value:
                for task in [task for task, index in tasks.items() if not board.began[index]]:
                    executor.kill(task)
                    del tasks[task]
            for task in wait(tasks, _POLL_S, FIRST_COMPLETED).done:
                index = tasks.pop(task)
                results[index] = answer(task, jobs[index].name)
            show(board.left)
    return dict(sorted(results.items()))


class _Here:
    """What a process that simulates is given when it begins."""

    board: ClassVar[Board]

    @classmethod
    def know(cls, *board: Any) -> None:
        cls.board = Board(*board)


def _simulate_here(job: Job, index: int) -> Result:
    return _simulate(job, index, _Here.board)
