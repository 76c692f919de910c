"""The search for the cheapest fleet: estimates, one exact bracket for each line of candidates, then challengers.

A line is a GPU, a policy and what it caches. Each is searched in the split that estimates favour; every other split,
and pools of replicas for prompts alone, are then simulated once with the most replicas that would still be cheaper, and
searched further only where that holds. So each line ends with its cheapest fleet, and the answer is the cheapest line.
"""

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from kvsim.planning.candidates import Family, Line
from kvsim.planning.closed_form import Work, keeps, replicas_needed, work_of
from kvsim.planning.findings import Estimate
from kvsim.planning.loads import seek_load, trace_curves
from kvsim.planning.measured import Measured
from kvsim.planning.search import Bracket, smallest
from kvsim.planning.simulations import Key, Simulations, Task
from kvsim.planning.sizes import Sizes
from kvsim.planning.slo import Objective
from policies import Full
from traces import Trace

_FAR = 1.25  # times as dear as the best, or as far from the SLO: not worth a simulation
Splits = tuple[str, int, int]


class Planner(Sizes):
    """Searches families on the traces of one or more seeds; `replicas_of` fixes the size of each where it is given."""

    def __init__(
        self,
        simulations: Simulations,
        traces: Sequence[Trace],
        objectives: Sequence[Objective],
        most_gpus: int,
        fixed_gpus: int | None,
        pools: bool,
        seed: int,
    ) -> None:
        super().__init__(simulations, objectives)
        self.traces = traces
        self._most_gpus, self._fixed_gpus, self._pools, self._seed = most_gpus, fixed_gpus, pools, seed
        self._works: dict[Splits, Work] = {}

    def run(self, first: Callable[[Estimate], None]) -> None:
        """Fill `found`; `first` is told the first estimate. An exception leaves what was found by then."""
        self._estimate()
        if self.found.estimates:
            first(min(self.found.estimates, key=lambda one: (not one.holds, one.usd_per_hour)))
        leading = [i for i, one in enumerate(self.families) if one.line[1:] == self.families[0].line[1:]]
        self._search(leading)
        self._search([i for i in range(len(self.families)) if self.families[i].line not in self._lines(leading)])
        self._verify()
        seek_load(self, every_split=self._fixed_gpus is not None)
        self._resample()
        trace_curves(self)

    def _search(self, indices: Sequence[int]) -> None:
        """The best fleet of some lines, from the split and the pools that their GPU's first line is best in."""
        hopeless = self._hopeless()
        first = self._starts(indices)
        self._bracket(list(first), lambda index: first[index])
        self._challenge(
            [i for i in indices if i not in first and (self.families[i].gpu, self._split(i)) not in hopeless]
        )
        if self._pools:
            self._challenge(self._pooled(self._lines(indices)))

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _most(self, index: int) -> int:
        return (self._fixed_gpus or self._most_gpus) // self.families[index].gpus_each

    def _least(self, index: int) -> int:
        return self._most(index) if self._fixed_gpus else self.families[index].fewest

    # -- phases --------------------------------------------------------------------------------------------------

    def work(self, index: int) -> Work:
        """A trace's work on a replica of the family's split, with the full cache: a guide, for any policy."""
        family = self.families[index]
        split = family.gpu, family.setup.tp, family.setup.pp
        if split not in self._works:
            full = replace(family, setup=replace(family.setup, policy=Full()))
            self._works[split] = work_of(full, self.traces[0])
        return self._works[split]

    def _estimate(self) -> None:
        for index in range(len(self.families)):
            family = self.families[index]
            replicas = min(self._most(index), replicas_needed(self.work(index), self.objectives, self._most_gpus))
            usd, holds = family.usd_per_hour(replicas), keeps(self.work(index), self.objectives, replicas)
            self.found.estimates.append(Estimate(family=index, replicas=replicas, usd_per_hour=usd, holds=holds))

    def _hopeless(self) -> set[tuple[str, tuple[int, int]]]:
        """Splits, without pools, that are far from what their GPU's first line is best in: others do not try them."""
        best = {self.families[i].gpu: i for i in reversed(self.best_of_lines())}
        found = set()
        for i, bracket in self.found.brackets.items():
            family, like = self.families[i], best[self.families[i].gpu]
            if family.prefill_share is not None or self.holds(like) is None:
                continue
            dear = self.usd(i) > _FAR * self.usd(like)
            measured = self.simulations.done.get(self.key(i, bracket.best))
            far = isinstance(measured, Measured) and measured.ratio(self.objectives) > _FAR
            if dear and (self.holds(i) is not None or far):
                found.add((family.gpu, self._split(i)))
        return found

    def _starts(self, indices: Sequence[int]) -> dict[int, int]:
        """For each line the family to begin with, and with how many replicas.

        What the GPU's first line is best in, or else the split that is cheapest by estimate.
        """
        chosen: dict[Line, int] = {}
        for i in indices:
            best = chosen.setdefault(self.families[i].line, i)
            if self.found.estimates[i].usd_per_hour < self.found.estimates[best].usd_per_hour:
                chosen[self.families[i].line] = i
        starts = {}
        known = {self.families[i].gpu: i for i in reversed(self.best_of_lines())}
        for line, index in chosen.items():
            like = known.get(line[0])
            alike = [
                i
                for i in indices
                if self.families[i].line == line and like is not None and self._split(i) == self._split(like)
            ]
            if like is None or not alike or self.holds(like) is None:
                starts[index] = self.found.estimates[index].replicas
                continue
            family = alike[0]
            if self.families[like].prefill_share is not None and _may_be_pooled(self.families[family]):
                served = self.best(like)
                pools = replace(self.families[family], prefill_share=served.prompts / served.replicas)
                family = self._add(pools, family)
            starts[family] = self.holds(like) or 1
        return {index: start for index, start in starts.items() if self._most(index) >= self._least(index) >= 1}

    def _split(self, index: int) -> tuple[int, int]:
        return self.families[index].setup.tp, self.families[index].setup.pp

    def _lines(self, indices: Sequence[int]) -> set[Line]:
        return {self.families[i].line for i in indices}

    def _bracket(self, indices: Sequence[int], start: Callable[[int], int]) -> None:
        tasks = [self.sized(i, smallest(start(i), self._least(i), self._most(i))) for i in indices]
        self.simulations.all(tasks)

    def _challenge(self, indices: Sequence[int]) -> None:
        """Look whether a family is cheaper than the best of its line, simulating the most replicas that would be."""
        lines: dict[Line, float] = {}
        for i in self.found.brackets:
            lines[self.families[i].line] = min(self.usd(i), lines.get(self.families[i].line, math.inf))
        tasks = []
        for index in indices:
            family, least = self.families[index], self._least(index)
            usd = lines.get(family.line, math.inf)
            most = self._most(index)
            if usd < math.inf and not self._fixed_gpus:
                most = min(most, math.ceil(usd / family.usd_per_hour(1) - 1e-9) - 1)
            self.found.tried_up_to[index] = most
            if most >= least:
                start = most if usd < math.inf else self.found.estimates[index].replicas
                tasks.append(self.sized(index, smallest(start, least, most)))
        self.simulations.all(tasks)

    def _pooled(self, lines: AbstractSet[Line]) -> list[int]:
        """New families with pools: the best split of each line, its work shared out between prompts and decoding."""
        new = []
        for index in self.best_of_lines():
            family = self.families[index]
            if family.line in lines and family.prefill_share is None and _may_be_pooled(family):
                new.append(self._add(replace(family, prefill_share=self._prefill_share(index)), index))
        return new

    def _add(self, family: Family, beside: int) -> int:
        """The index of a new family, which is taken to need as much as another one."""
        self.families.append(family)
        self.found.estimates.append(replace(self.found.estimates[beside], family=len(self.families) - 1))
        return len(self.families) - 1

    def _prefill_share(self, index: int) -> float:
        """Of all work that of prompts, less what was cached where the family was simulated."""
        share = self.work(index).prefill_share
        measured = self.simulations.done.get(self.best(index))
        if isinstance(measured, Measured) and measured.prompt_tokens:
            share *= 1 - measured.cached_tokens / measured.prompt_tokens
        return share / (share + 1 - self.work(index).prefill_share)

    def _verify(self) -> None:
        """Let the cheapest family hold on every seed's trace, with more replicas where it takes them."""
        while True:
            ranked = sorted((i for i in self.found.brackets if self.holds(i) is not None), key=self._rank)
            if not ranked:
                return
            index = ranked[0]
            self.found.answer = index
            if len(self.traces) == 1 or self._check_seeds(index):
                return

    def _rank(self, index: int) -> tuple[float, float, int]:
        """The cheapest first, of those the one of fewer GPUs; of a size that is fixed, that furthest from the SLO."""
        gpus = (self.holds(index) or 0) * self.families[index].gpus_each
        return self.usd(index), self.nearness(index) if self._fixed_gpus else gpus, index

    def _check_seeds(self, index: int) -> bool:
        """Whether the family's bracket holds on all seeds; if not, its lower end moves up by one replica."""
        bracket = self.found.brackets[index]
        replicas = bracket.holds
        if replicas is None:
            return True
        keys = [self.key(index, replicas, seed=seed) for seed in range(len(self.traces))]
        ratios = self.simulations.all([self._ratio(key) for key in keys])
        if max(ratios) <= 1:
            return True
        more = replicas + 1 if replicas < self._most(index) else None
        self.found.brackets[index] = Bracket(more, replicas, more or replicas)
        if more is not None:
            self.simulations.all([self.served_best(index, more)])
        return False

    def _resample(self) -> None:
        """Intervals of each line's best, where the trace is recorded."""
        if len(self.traces) > 1:
            return
        keys = [self.best(i) for i in self.best_of_lines()]
        self.found.intervals_s = self.simulations.intervals(keys, self._seed)

    def _ratio(self, key: Key) -> Task[float]:
        measured = yield key
        return self.how_far(measured)


def _may_be_pooled(family: Family) -> bool:
    """Whether the simulator takes prompts and decoding apart there; what it refuses beyond is found by trying."""
    setup = family.setup
    limits = any(one.quota < 1 or one.replicas is not None for one in setup.tenants.values())
    return not (
        setup.pp > 1
        or setup.scheduler != "fcfs"
        or limits
        or setup.session_kv != "recompute"
        or setup.prefix_cache_hbm_bytes
        or (setup.speculation is not None and setup.speculation.draft is not None)
    )
