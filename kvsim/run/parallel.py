"""Simulations beside each other, one process for each policy and seed, which Ctrl-C ends early but in order."""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import c_bool
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawArray, RawValue
from multiprocessing.util import get_temp_dir
from typing import Any, NamedTuple

from kvsim.results.summary import Result
from kvsim.run.simulate import Setup, compile_loop, simulate
from policies import describe
from traces import Trace

_POLL_S = 0.1
_ENDING_S = 5.0  # that a process takes at the most once it was told to end

Show = Callable[[Sequence[int]], None]
"""Is told, now and then, how many requests have left each simulation."""


class Outcome(NamedTuple):
    """Results by the index of their job; after an interruption partial ones, without jobs that had not begun."""

    results: dict[int, Result]
    interrupted: bool


class Job(NamedTuple):
    """One simulation."""

    trace: Trace
    setup: Setup


def simulate_all(jobs: Sequence[Job], show: Show) -> Outcome:
    """Do every job, at most as many at a time as there are processors.

    The first Ctrl-C ends simulations that have begun at their next event boundary, and the others at once; where none
    has begun, and at a second one, KeyboardInterrupt is raised. Raises the ValueError of a simulation, with the name of
    its policy when there are several.
    """
    left, began, stop = RawArray("q", len(jobs)), RawArray(c_bool, len(jobs)), RawValue(c_bool)
    with _stopping(began, stop):
        if len(jobs) == 1:
            results = {0: _simulate(jobs[0], 0, left, began, stop, show)}
        else:
            results = _simulate_beside(jobs, left, began, stop, show)
    return Outcome(results, bool(stop.value))


@contextmanager
def _stopping(began: Any, stop: Any) -> Iterator[None]:
    """Ctrl-C sets `stop`: an exception in the midst of an event would leave the simulation's books unbalanced."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def handle(*_: object) -> None:
        if stop.value or not any(began):
            raise KeyboardInterrupt
        stop.value = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _simulate(job: Job, index: int, left: Any, began: Any, stop: Any, show: Show | None = None) -> Result:
    def progress(gone: int) -> None:
        began[index] = True
        left[index] = gone
        if show:
            show(left)
        if stop.value:
            raise KeyboardInterrupt  # between two events, where `simulate` takes it

    return simulate(job.trace, job.setup, progress)


def _simulate_beside(jobs: Sequence[Job], left: Any, began: Any, stop: Any, show: Show) -> dict[int, Result]:
    kept = True
    with suppress(ValueError):  # one that cannot run says so itself, with its policy's name
        kept = compile_loop(*jobs[0])
    if not kept:  # each process would compile for itself, which takes longer than most replays
        return _simulate_in_turn(jobs, left, began, stop, show)
    context, temporary = _processes(), get_temp_dir()
    waiting = list(enumerate(jobs))
    running: dict[Connection, tuple[int, Any]] = {}
    results: dict[int, Result] = {}
    try:
        while running or (waiting and not stop.value):
            while waiting and len(running) < (os.cpu_count() or 1) and not stop.value:
                index, job = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                given = sender, job, index, left, began, stop, temporary
                process = context.Process(target=_child, args=given, daemon=True)
                running[receiver] = index, process
                _start_deaf(process)
                sender.close()
            if stop.value:
                for receiver in [receiver for receiver, (index, _) in running.items() if not began[index]]:
                    _end([running.pop(receiver)[1]])
            ready = wait(list(running), _POLL_S)
            for receiver in [receiver for receiver in running if receiver in ready]:
                index, process = running.pop(receiver)
                results[index] = _received(receiver, process, describe(jobs[index].setup.policy))
            show(left)
    finally:
        _end([process for _, process in running.values()])  # a failure of one ends the others
    return dict(sorted(results.items()))


def _simulate_in_turn(jobs: Sequence[Job], left: Any, began: Any, stop: Any, show: Show) -> dict[int, Result]:
    results: dict[int, Result] = {}
    for index, job in enumerate(jobs):
        if stop.value:
            break
        try:
            results[index] = _simulate(job, index, left, began, stop, show)
        except ValueError as error:
            raise ValueError(f"policy {describe(job.setup.policy)}: {error}") from None
    return results


def _end(processes: Sequence[Any]) -> None:
    """End processes that are still at work, and wait until they are gone."""
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.terminate()
    for process in started:
        process.join(_ENDING_S)
        if process.is_alive():
            process.kill()


def _processes() -> Any:
    """How processes start: from one that has imported this module and has no threads, which a fork may not survive."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_deaf(process: Any) -> None:
    """Start a process that Ctrl-C in the terminal does not reach; `stop` does.

    This process hears it all the while: a signal is only held back until the other one ignores it by itself.
    """
    if not hasattr(signal, "pthread_sigmask"):
        process.start()
        return
    resource_tracker.ensure_running()  # starting it would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(sender: Connection, job: Job, index: int, left: Any, began: Any, stop: Any, temporary: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, args=(temporary,), daemon=True).start()
    try:
        sender.send(_simulate(job, index, left, began, stop))
    except ValueError as error:
        sender.send(str(error))


def _end_with_parent(temporary: str) -> None:
    """End this process once the one that started it was killed, with the temporary folder that it had."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        shutil.rmtree(temporary, ignore_errors=True)
        os._exit(1)


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
