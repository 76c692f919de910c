"""The simulations that a plan asks for: each made once, a few beside each other, the first in the list first."""

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from kvsim.planning.candidates import Family
from kvsim.planning.measured import Ask, Measured, measure, resampled
from kvsim.run.executor import Processes
from kvsim.run.jobs import Job, answer
from traces import Trace

T = TypeVar("T")
LOAD_STEP = 1.05  # between two loads that are tried


class Key(NamedTuple):
    """A simulation: a family by its index, how many replicas, LOAD_STEPs of load above the trace's, which seed."""

    family: int
    replicas: int
    prompts: int = 0  # replicas that process prompts alone
    load: int = 0
    seed: int = 0

    @property
    def rate_scale(self) -> float:
        """How many times as fast requests arrive."""
        return float(LOAD_STEP**self.load)


class Failed(NamedTuple):
    """Why a simulation could not run."""

    reason: str


Task = Generator[Key, Measured | Failed, T]
"""Says which simulation it needs next, is sent what came of it, and returns what it found."""


def _begin() -> None:
    """Processes of a plan share nothing."""


class Simulations(AbstractContextManager["Simulations"]):
    """Runs tasks; `progress` is told how many simulations have ended.

    `made` counts simulations, `cpu_s` what they took, `done` keeps what came of each.
    """

    def __init__(
        self,
        families: list[Family],
        traces: Sequence[Trace],
        ask: Ask,
        progress: Callable[[int], None] = lambda _ended: None,
    ) -> None:
        self._progress, self._ended = progress, 0
        self.families, self.done = families, dict[Key, Measured | Failed]()
        self.made, self.cpu_s = 0, 0.0
        self._traces, self._ask = traces, ask
        self._workers = [Processes(1, _begin) for _ in range(os.cpu_count() or 1)]
        self._twins: dict[tuple[object, ...], Key] = {}  # the first to ask for a simulation
        self._homes: dict[tuple[str, str, int, int], int] = {}  # who has derived which plans

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        for worker in self._workers:
            worker.__exit__(kind, error, trace)

    def all(self, tasks: Sequence[Task[T]]) -> list[T]:
        """What each task returns, in their order; one whose simulation cannot run is sent why."""
        found: dict[int, T] = {}
        wanted: dict[int, Key] = {}
        running: dict[Future[Measured], Key] = {}
        for number, task in enumerate(tasks):
            self._advance(number, task, None, wanted, found)
        while wanted:
            for number in [number for number, key in wanted.items() if key in self.done]:
                key = wanted.pop(number)
                self._advance(number, tasks[number], self.done[key], wanted, found)
            self._fill([wanted[number] for number in sorted(wanted)], running)
            if running and not any(key in self.done for key in wanted.values()):
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._keep(running.pop(future), future)
        return [found[number] for number in range(len(tasks))]

    def _advance(
        self, number: int, task: Task[T], sent: Measured | Failed | None, wanted: dict[int, Key], found: dict[int, T]
    ) -> None:
        try:
            wanted[number] = next(task) if sent is None else task.send(sent)
        except StopIteration as end:
            found[number] = end.value

    def _fill(self, wanted: Sequence[Key], running: dict[Future[Measured], Key]) -> None:
        """Give free workers what is wanted first: each what it has derived plans for, then whatever is left."""
        for at_home in (True, False):
            for key in dict.fromkeys(wanted):
                twin = self._twins.setdefault(self._fleet(key), key)
                if twin in self.done:
                    self.done[key] = self.done[twin]
                elif twin not in running.values():
                    self._start(twin, running, at_home=at_home)

    def _fleet(self, key: Key) -> tuple[object, ...]:
        """What tells one simulation from another: families of pools may come to the same numbers."""
        family = self.families[key.family]
        split = family.setup.tp, family.setup.pp, key.prompts
        return (*family.line, *split, key.replicas, key.load, key.seed)

    def _start(self, key: Key, running: dict[Future[Measured], Key], *, at_home: bool) -> None:
        free = [number for number, worker in enumerate(self._workers) if worker.free]
        family = self.families[key.family]
        plans = family.gpu, family.policy, family.setup.tp, family.setup.pp
        home = self._homes.get(plans)
        if not free or (at_home and home not in (None, *free)):
            return
        chosen = home if home in free and home is not None else free[0]
        trace = self._traces[key.seed]
        try:
            setup = family.fleet(key.replicas, key.prompts)
            job = Job(trace if key.load == 0 else trace.scaled_rate(key.rate_scale), setup)
        except ValueError as error:
            self.done[key] = Failed(str(error))
            return
        self._homes.setdefault(plans, chosen)
        self.made += 1
        running[self._workers[chosen].submit(measure, job, self._ask)] = key

    def _keep(self, key: Key, future: Future[Measured]) -> None:
        family = self.families[key.family]
        self._ended += 1
        self._progress(self._ended)
        try:
            measured = self.done[key] = answer(
                future, f"{family.policy} on {key.replicas * family.gpus_each} x {family.gpu}"
            )
        except (ValueError, OSError, MemoryError) as error:  # a killed process costs its simulation alone
            self.done[key] = Failed(str(error))
            return
        self.cpu_s += measured.cpu_s

    def intervals(self, keys: Sequence[Key], seed: int) -> dict[Key, dict[str, tuple[float, float]]]:
        """For each simulation that was made the intervals of its objectives, by resampling its requests."""
        found: dict[Key, dict[str, tuple[float, float]]] = {}
        waiting = {key: one.samples_s for key in keys if isinstance(one := self.done.get(key), Measured)}
        running: dict[Future[dict[str, tuple[float, float]]], Key] = {}
        while waiting or running:
            for worker in (worker for worker in self._workers if worker.free and waiting):
                key = next(iter(waiting))
                running[worker.submit(resampled, waiting.pop(key), self._ask.objectives, seed)] = key
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                found[running.pop(future)] = future.result()
        return found


def one(key: Key) -> Task[Measured | Failed]:
    """The task of a single simulation."""
    return (yield key)
