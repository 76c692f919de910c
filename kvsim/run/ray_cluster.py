"""Tasks on the workers of a Ray cluster, in place of processes of this machine."""

import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from kvsim.run.executor import WorkerDied
from policies.shown import shown

T = TypeVar("T")
_ANSWER_S = 5.0  # that the head of a cluster may take to accept a connection
_KILLED = -9


class RayCluster:
    """An `Executor` with a task for each processor of a running cluster, at an address or, `auto`, on this machine.

    Its workers need kvsim installed. Nothing is reported to anybody.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._tasks: dict[Future[Any], Any] = {}
        self._ray: Any = None
        self._run: Any = None

    @property
    def free(self) -> int:
        """How many tasks would begin at once if they came now, by the processors that the cluster has at present."""
        return max(0, int(self._ray.cluster_resources().get("CPU", 0)) - len(self._tasks))

    def submit(self, do: Callable[..., T], *args: object) -> Future[T]:
        """Have a worker do a task."""
        reference = self._run.remote(do, args)
        task: Future[T] = Future()
        task.set_running_or_notify_cancel()
        self._tasks[task] = reference
        reference.future().add_done_callback(lambda found: self._settle(task, found))
        return task

    def kill(self, task: Future[Any]) -> None:
        """End a task and the worker that does it."""
        if (reference := self._tasks.pop(task, None)) is not None:
            self._ray.cancel(reference, force=True)

    def __enter__(self) -> Self:
        """Connect. Raises ValueError where Ray is not installed, or no cluster answers at the address."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError:
            raise ValueError("--ray needs Ray: pip install 'kvsim[ray]', here and on the cluster's machines") from None
        _knock(self._address)
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--ray {shown(self._address)}: no Ray cluster can be used there ({shown(reason)}); start one with "
                "`ray start --head`, or leave --ray out"
            ) from None
        self._ray = ray
        self._run = ray.remote(max_retries=0, num_cpus=1)(_answered)
        return self

    def __exit__(self, *_: object) -> None:
        for task in list(self._tasks):
            self.kill(task)
        self._ray.shutdown()

    def _settle(self, task: Future[Any], found: "Future[Any]") -> None:
        self._tasks.pop(task, None)
        error = found.exception()
        if error is not None:
            died = isinstance(error, self._ray.exceptions.RayError) and not isinstance(
                error, self._ray.exceptions.RayTaskError
            )
            task.set_exception(WorkerDied(_KILLED) if died else error)
            return
        has_failed, answer = found.result()
        (task.set_exception if has_failed else task.set_result)(answer)


def _answered(do: Callable[..., T], args: tuple[object, ...]) -> tuple[bool, T | Exception]:
    """What a task gives, and its errors by which bad input is told, as plain ones."""
    try:
        return False, do(*args)
    except (ValueError, MemoryError) as error:
        kind = ValueError if isinstance(error, ValueError) else MemoryError
        return True, kind(str(error))


def _knock(address: str) -> None:
    """Raise ValueError at once where nothing listens at HOST:PORT, for which Ray itself waits long."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local") or not colon:
        if address != "auto":
            raise ValueError(f"--ray {shown(address)} must be auto, HOST:PORT or ray://HOST:PORT")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--ray {shown(address)}: nothing answers there ({reason}); is the cluster running?") from None
