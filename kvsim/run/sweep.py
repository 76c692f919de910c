"""Thousands of short simulations: sent in batches, answered as they end, and none lost because another failed."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from typing import NamedTuple, TypeVar

from kvsim.results.summary import Result
from kvsim.run.executor import Executor, Processes
from kvsim.run.jobs import TOO_LITTLE_MEMORY, Job, answer, run

T = TypeVar("T")
_BATCH_S = 1.0  # that a batch should take: long beside what it costs to send, short beside the wait for the last one
_MOST_JOBS = 256


class Failure(NamedTuple):
    """Why a job has no result, with its name; `was_killed` where its process was, twice, and another try may do."""

    reason: str
    was_killed: bool = False


def sweep(
    jobs: Iterable[Job], keep: Callable[[Result], T], executor: Executor | None = None
) -> Iterator[tuple[int, T | Failure]]:
    """Of each job, in whatever order they end: its index, and what `keep` makes of its result.

    `keep` is a function of a module, such as `summarize`: whole results are large. Jobs are taken as they are needed,
    so they may be made one by one, and each pair may be put away when it comes; whoever goes on later leaves out the
    jobs that have one. A job that cannot run, or whose process is killed (it is tried once more), costs itself alone.
    Closing the iterator, and an exception, end the processes: by default as many as there are processors.
    """
    waiting, suspects, batch_jobs = enumerate(jobs), deque[tuple[int, Job]](), 1
    killed: set[int] = set()  # jobs whose process was, while they were alone in it
    tasks: dict[Future[tuple[float, list[T | Failure]]], list[tuple[int, Job]]] = {}
    with executor or Processes(os.cpu_count() or 1, _begin) as workers:
        while True:
            while workers.free:
                batch = [suspects.popleft()] if suspects else list(islice(waiting, batch_jobs))
                if not batch:
                    break
                tasks[workers.submit(_simulate, [job for _, job in batch], keep)] = batch
            if not tasks:
                return
            for task in wait(tasks, return_when=FIRST_COMPLETED).done:
                batch = tasks.pop(task)
                try:
                    took_s, found = answer(task, batch[0][1].name)
                except OSError as error:
                    if len(batch) > 1 or batch[0][0] not in killed:
                        # One of them took its process with it, or somebody else did: each alone from here on.
                        killed |= {batch[0][0]} if len(batch) == 1 else set()
                        suspects.extend(batch)
                        continue
                    took_s, found = _BATCH_S, [Failure(str(error), was_killed=True)]
                batch_jobs = max(1, min(int(_BATCH_S * len(batch) / max(took_s, 1e-9)), 2 * len(batch), _MOST_JOBS))
                yield from zip((index for index, _ in batch), found, strict=True)


def _begin() -> None:
    """Processes of a sweep share nothing."""


def _simulate(jobs: Sequence[Job], keep: Callable[[Result], T]) -> tuple[float, list[T | Failure]]:
    began_s = time.monotonic()
    found: list[T | Failure] = []
    for job in jobs:
        try:
            result = run(job)
        except ValueError as error:
            found.append(Failure(f"{job.name}: {error}"))
        except MemoryError:
            found.append(Failure(f"{job.name}: {TOO_LITTLE_MEMORY}"))
        else:
            found.append(keep(result))
    return time.monotonic() - began_s, found
