"""The simulations that a plan asks for: each made once, a few beside each other, the first in the list first."""

import os
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from kvsim.planning.candidates import Family
from kvsim.planning.measured import Ask, Measured, measure
from kvsim.run.executor import Processes
from kvsim.run.jobs import Job, answer
from traces import Trace

T = TypeVar("T")
LOAD_STEP = 1.05  # between two loads that are tried


class Key(NamedTuple):
    """A simulation: a family by its index, how many replicas, how many LOAD_STEPs more load, which seed's trace."""

    family: int
    replicas: int
    load: int = 0
    seed: int = 0
    resample: bool = False

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
    """Runs tasks; `made` counts simulations, `cpu_s` what they took, `done` keeps what came of each."""

    def __init__(self, families: list[Family], traces: Sequence[Trace], ask: Ask) -> None:
        self.families, self.done = families, dict[Key, Measured | Failed]()
        self.made, self.cpu_s = 0, 0.0
        self._traces, self._ask = traces, ask
        self._workers = [Processes(1, _begin) for _ in range(os.cpu_count() or 1)]
        self._homes: dict[tuple[str, str, int, int], int] = {}  # who has derived which plans

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        for worker in self._workers:
            worker.__exit__(kind, error, trace)

    def all(self, tasks: Sequence[Task[T]]) -> list[T]:
        """What each task returns, in their order. Raises OSError where the process of a simulation was killed."""
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
                if key not in self.done and key not in running.values():
                    self._start(key, running, at_home=at_home)

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
            setup = family.fleet(key.replicas)
            job = Job(trace if key.load == 0 else trace.scaled_rate(key.rate_scale), setup)
        except ValueError as error:
            self.done[key] = Failed(str(error))
            return
        self._homes.setdefault(plans, chosen)
        self.made += 1
        running[self._workers[chosen].submit(measure, job, replace(self._ask, resample=key.resample))] = key

    def _keep(self, key: Key, future: Future[Measured]) -> None:
        family = self.families[key.family]
        try:
            measured = self.done[key] = answer(
                future, f"{family.policy} on {key.replicas * family.gpus_each} x {family.gpu}"
            )
        except ValueError as error:
            self.done[key] = Failed(str(error))
            return
        self.cpu_s += measured.cpu_s
        if key.resample:
            self.done[key._replace(resample=False)] = measured


def one(key: Key) -> Task[Measured | Failed]:
    """The task of a single simulation."""
    return (yield key)
