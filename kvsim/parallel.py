"""Simulations beside each other, one process for each policy and seed, which Ctrl-C ends early but in order."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import c_bool
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawArray, RawValue
from typing import Any, NamedTuple

from kvsim.results import Result
from kvsim.simulate import Setup, compile_loop, simulate
from policies import describe
from traces import Trace

_POLL_S = 0.1

Show = Callable[[Sequence[int]], None]
"""Is told, now and then, how many requests have left each simulation."""


class Outcome(NamedTuple):
    """Results in the order of the jobs; after an interruption partial ones, without the last, which never began."""

    results: list[Result]
    interrupted: bool


class Job(NamedTuple):
    """One simulation."""

    trace: Trace
    setup: Setup


def simulate_all(jobs: Sequence[Job], show: Show) -> Outcome:
    """Do every job, at most as many at a time as there are processors.

    The first Ctrl-C ends the simulations at their next event boundary, a second one at once (KeyboardInterrupt).
    Raises the ValueError of a simulation, with the name of its policy when there are several.
    """
    left, stop = RawArray("q", len(jobs)), RawValue(c_bool)
    with _stopping(stop):
        if len(jobs) == 1:
            results = [_simulate(jobs[0], 0, left, stop, show)]
        else:
            results = _simulate_beside(jobs, left, stop, show)
    return Outcome(results, bool(stop.value))


@contextmanager
def _stopping(stop: Any) -> Iterator[None]:
    """Ctrl-C sets `stop`: an exception in the midst of an event would leave the simulation's books unbalanced."""

    def handle(*_: object) -> None:
        if stop.value:
            raise KeyboardInterrupt
        stop.value = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _simulate(job: Job, index: int, left: Any, stop: Any, show: Show | None = None) -> Result:
    def progress(gone: int) -> None:
        left[index] = gone
        if show:
            show(left)
        if stop.value:
            raise KeyboardInterrupt  # between two events, where `simulate` takes it

    return simulate(job.trace, job.setup, progress)


def _simulate_beside(jobs: Sequence[Job], left: Any, stop: Any, show: Show) -> list[Result]:
    with suppress(ValueError):  # one that cannot run says so itself, with its policy's name
        compile_loop(*jobs[0])
    context = _processes()
    waiting = list(enumerate(jobs))
    running: dict[Connection, tuple[int, Any]] = {}
    results: dict[int, Result] = {}
    try:
        while running or (waiting and not stop.value):
            while waiting and len(running) < (os.cpu_count() or 1) and not stop.value:
                index, job = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(sender, job, index, left, stop), daemon=True)
                _start_deaf(process)
                sender.close()
                running[receiver] = index, process
            ready = wait(list(running), _POLL_S)
            for receiver in [receiver for receiver in running if receiver in ready]:
                index, process = running.pop(receiver)
                results[index] = _received(receiver, process, describe(jobs[index].setup.policy))
            show(left)
    finally:
        for _, process in running.values():  # a failure of one ends the others
            process.terminate()
    return [results[index] for index in sorted(results)]


def _processes() -> Any:
    """How processes start: from one that has imported this module and has no threads, which a fork may not survive."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_deaf(process: Any) -> None:
    """Start a process that Ctrl-C in the terminal does not reach; `stop` does."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)


def _child(sender: Connection, job: Job, index: int, left: Any, stop: Any) -> None:
    try:
        sender.send(_simulate(job, index, left, stop))
    except ValueError as error:
        sender.send(str(error))


def _received(receiver: Connection, process: Any, policy: str) -> Result:
    try:
        answer: Result | str = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode < 0:
            raise OSError(f"policy {policy}: its process was killed; is there enough memory?") from None
        raise RuntimeError(f"policy {policy}: its process failed, as said above") from None  # a bug, not bad input
    if isinstance(answer, str):
        raise ValueError(f"policy {policy}: {answer}")
    return answer
