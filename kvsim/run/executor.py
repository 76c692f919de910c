"""Where tasks run beside each other: an interface, and the processes of this machine that fill it.

Tasks are given and answered through a pipe for each process, not through one queue: the death of a process, for want
of memory, say, costs the task that it held and no other, and tells which. No semaphore is left when this process is
killed, and the others end with it.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.util import get_temp_dir
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

T = TypeVar("T")
_ENDING_S = 5.0  # that a process takes at the most once it was told to end


class WorkerDied(Exception):
    """The process that did a task ended before it had answered, with this exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.was_killed = exit_code < 0


class Executor(Protocol):
    """Does tasks, one at a time in each worker; what a cluster's scheduler must offer to stand in for processes."""

    @property
    def free(self) -> int:
        """How many tasks would begin at once if they came now."""

    def submit(self, do: Callable[..., T], *args: object) -> Future[T]:
        """Have a free worker do a task; the future raises the task's ValueError or MemoryError, and WorkerDied.

        Raises RuntimeError where none is free.
        """

    def kill(self, task: Future[Any]) -> None:
        """End a task that has not answered, and its worker, at once; its future is worth nothing from here on."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """End all tasks and workers."""


class Processes:
    """Processes of this machine, `most` at a time, which Ctrl-C does not reach: they end when they are told to.

    Each calls `begin(*shared)` first; memory that is shared between processes can only be handed over there.
    """

    def __init__(self, most: int, begin: Callable[..., None], *shared: object) -> None:
        self._most, self._begin = most, (begin, shared)
        self._workers: list[_Worker] = []

    @property
    def free(self) -> int:
        """How many tasks would begin at once if they came now."""
        return self._most - sum(worker.is_busy for worker in self._workers)

    def submit(self, do: Callable[..., T], *args: object) -> Future[T]:
        """Have a process do a task: one that has done another, or a new one."""
        if not self.free:
            raise RuntimeError(f"all {self._most} processes are at work; wait for one of them")
        self._workers = [worker for worker in self._workers if not worker.is_dead]
        worker = next((worker for worker in self._workers if not worker.is_busy), None)
        if worker is None:
            worker = _Worker(*self._begin)
            self._workers.append(worker)
        return worker.submit(do, *args)

    def kill(self, task: Future[Any]) -> None:
        """End the process that does a task."""
        for worker in [worker for worker in self._workers if worker.task is task]:
            self._workers.remove(worker)
            _end([worker])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        workers, self._workers = self._workers, []
        _end(workers)


class _Worker:
    """One process, which does one task after another, and the thread that hears its answers."""

    def __init__(self, begin: Callable[..., None], shared: tuple[object, ...]) -> None:
        context = _processes()
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, get_temp_dir(), begin, shared), daemon=True)
        self.task: Future[Any] | None = None
        self.is_dead = False
        self._dying = threading.Lock()
        with _deaf():
            self.process.start()
        theirs.close()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    @property
    def is_busy(self) -> bool:
        return self.task is not None and not self.task.done()

    def submit(self, do: Callable[..., T], *args: object) -> Future[T]:
        task: Future[T] = Future()
        task.set_running_or_notify_cancel()
        self.task = task
        with suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.send((do, args))
        if self.is_dead:  # and the listener may have looked before there was a task
            self._die()
        return task

    def _listen(self) -> None:
        while True:
            try:
                has_failed, answer = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                break
            if self.task is not None:
                (self.task.set_exception if has_failed else self.task.set_result)(answer)
        self.is_dead = True
        self._die()

    def _die(self) -> None:
        with self._dying:  # two that wait for a process at a time may miss its exit code
            self.process.join()
            if self.task is not None and not self.task.done():
                self.task.set_exception(WorkerDied(self.process.exitcode))


def _end(workers: Sequence[_Worker]) -> None:
    """End processes, whatever they are at, and wait until they are gone."""
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.listener.join(_ENDING_S)
        if worker.listener.is_alive():
            worker.process.kill()
            worker.listener.join()


def _processes() -> Any:
    """How processes start: from one that has imported the simulator, and has no threads, which a fork may lose."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvsim.run.parallel"])
    return context


@contextmanager
def _deaf() -> Iterator[None]:
    """Inside, Ctrl-C is held back, which processes that start inherit; it is heard when the context ends."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, temporary: str, begin: Callable[..., None], shared: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, args=(temporary,), daemon=True).start()
    begin(*shared)
    while True:
        do, args = pipe.recv()
        try:
            answer = do(*args)
        except (ValueError, MemoryError) as error:  # others are bugs: this process ends with a traceback
            kind = ValueError if isinstance(error, ValueError) else MemoryError
            pipe.send((True, kind(str(error))))
        else:
            pipe.send((False, answer))


def _end_with_parent(temporary: str) -> None:
    """End this process once the one that started it was killed, with the temporary folder that it had."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        shutil.rmtree(temporary, ignore_errors=True)
        os._exit(1)
