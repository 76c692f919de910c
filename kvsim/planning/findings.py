"""What a plan has found so far: it may be read at any time, also after an interruption."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvsim.planning.candidates import Line
from kvsim.planning.measured import Measured
from kvsim.planning.search import Bracket
from kvsim.planning.simulations import Failed, Key, Simulations
from kvsim.planning.slo import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The fewest replicas of a family by closed forms."""

    family: int
    replicas: int
    usd_per_hour: float
    holds: bool  # False: as many replicas as may be bought do not


@dataclass(slots=True, kw_only=True)
class Found:
    """What the search has found so far: it may be read at any time."""

    estimates: list[Estimate] = field(default_factory=list)
    brackets: dict[int, Bracket] = field(default_factory=dict)  # by family: of the number of replicas
    prompts: dict[tuple[int, int], int] = field(default_factory=dict)  # by family and replicas: those for prompts alone
    tried_up_to: dict[int, int] = field(default_factory=dict)  # by family: beyond, it would be dearer than its line
    intervals_s: dict[Key, dict[str, tuple[float, float]]] = field(default_factory=dict)
    load: Bracket | None = None  # of the answer's LOAD_STEPs
    loads: dict[Key, Bracket] = field(default_factory=dict)  # of every fleet whose load was sought
    answer: int | None = None  # the family of the answer
    nearest: int | None = None  # where there is none, that of the fleet that holds the largest load


class Findings:
    """Brackets of families, and what follows from them and from what was simulated."""

    def __init__(self, simulations: Simulations, objectives: Sequence[Objective]) -> None:
        self.simulations, self.objectives = simulations, objectives
        self.families = simulations.families
        self.found = Found()

    def holds(self, index: int) -> int | None:
        """The fewest replicas of a family that hold the SLO, as far as is known."""
        bracket = self.found.brackets.get(index)
        return None if bracket is None else bracket.holds

    def key(self, index: int, replicas: int, load: int = 0, seed: int = 0) -> Key:
        """The simulation of a family with so many replicas, its pools as served best of those that were tried."""
        return Key(index, replicas, self.found.prompts.get((index, replicas), 0), load, seed)

    def best(self, index: int) -> Key:
        """The simulation of a family's fewest replicas that hold, or of those that came nearest."""
        return self.key(index, self.found.brackets[index].best)

    def usd(self, index: int) -> float:
        """What the family's fewest replicas cost an hour; infinite where none holds."""
        replicas = self.holds(index)
        return math.inf if replicas is None else self.families[index].usd_per_hour(replicas)

    def best_of_lines(self) -> list[int]:
        """For each line the family to report: the cheapest that holds, else the one that comes nearest."""
        best: dict[Line, int] = {}
        for i in self.found.brackets:
            current = best.setdefault(self.families[i].line, i)
            if (self.usd(i), self.nearness(i)) < (self.usd(current), self.nearness(current)):
                best[self.families[i].line] = i
        for chosen in (self.found.answer, self.found.nearest):
            if chosen is not None:
                best[self.families[chosen].line] = chosen
        return list(best.values())

    def nearness(self, index: int) -> float:
        """How far a family's best fleet is from the SLO: the largest of value / limit."""
        measured = self.simulations.done.get(self.best(index))
        return measured.ratio(self.objectives) if isinstance(measured, Measured) else math.inf

    def nearest(self) -> int | None:
        """The family that comes nearest to the SLO where none holds it."""
        if self.found.nearest is not None:
            return self.found.nearest
        tried = [i for i in self.found.brackets if math.isfinite(self.nearness(i))]
        return min(tried, key=lambda i: (self.nearness(i), i), default=None)

    def how_far(self, measured: Measured | Failed) -> float:
        """The largest of value / limit; infinite where a simulation could not run."""
        return measured.ratio(self.objectives) if isinstance(measured, Measured) else math.inf
