"""A simulation as a job for some process: its name, what it gives, and what it says when it fails."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple, TypeVar

from kvsim.results.summary import Result
from kvsim.run.simulate import Setup, simulate
from policies import describe
from traces import Trace

T = TypeVar("T")
TOO_LITTLE_MEMORY = "this takes more memory than there is; ask for fewer requests (--limit), seeds, GPUs or tokens"


class Job(NamedTuple):
    """One simulation; `seed` where it tells jobs of one policy apart."""

    trace: Trace
    setup: Setup
    seed: int | None = None

    @property
    def label(self) -> str:
        """What a progress bar calls it."""
        return describe(self.setup.policy) + ("" if self.seed is None else f", seed {self.seed}")

    @property
    def name(self) -> str:
        """What an error calls it."""
        return f"policy {self.label}"


def run(job: Job, progress: Callable[[int], None] | None = None) -> Result:
    """Simulate; the set-up is charged with what this process spent since it began or ended its last job."""
    result = simulate(job.trace, job.setup, progress)
    result = replace(result, setup_cpu_s=result.setup_cpu_s - _Charged.cpu_s)
    _Charged.cpu_s = time.process_time()
    return result


class _Charged:
    """What earlier jobs of this process took."""

    cpu_s = 0.0


def answer(task: Future[T], name: str) -> T:
    """What a task gave. Raises with the name of its job ValueError for what cannot run, MemoryError, and OSError where
    its process was killed.
    """
    from kvsim.run.executor import WorkerDied  # one job alone needs no processes

    try:
        return task.result()
    except WorkerDied as death:
        if death.was_killed:
            raise OSError(f"{name}: its process was killed; is there enough memory?") from None
        raise RuntimeError(f"{name}: its process failed, as said above") from None  # a bug, not bad input
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except MemoryError:
        raise MemoryError(f"{name}: {TOO_LITTLE_MEMORY}") from None
