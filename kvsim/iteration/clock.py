"""How long batches take on one rank of a model and its machine: what `price` needs for that, and its answers.

The inner loop calls `price` by itself, with arrays for all that it meets; here is the same for a few loads at a time.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvsim.hardware.machine import Machine
from kvsim.iteration.arrays import Floats, Record, Records
from kvsim.iteration.busy import BUSY
from kvsim.iteration.layout import lay_out
from kvsim.iteration.own import Layers, own_times
from kvsim.iteration.price import HEAD, OWN, PARTS, Batch, Prices, price
from kvsim.iteration.program import Program, compile_program
from kvsim.plans.derive import AMOUNTS, TIERS, Structure, Vector
from kvsim.plans.guessing import Guesser
from policies.model import ModelShape


class Load(NamedTuple):
    """The summed vectors of sequences whose plans share one structure."""

    structure: Structure
    amounts: Vector


class Iteration(NamedTuple):
    """One iteration's operations: their order, and for each what `Slot.time` indexes."""

    program: Program
    prices: Prices  # as they were left
    seconds: list[float]
    fixed_s: list[float]  # the part that is no transfer
    nbytes: list[int]


class Own(NamedTuple):
    """What the model's own layers take for some tokens: fields of OWN, and their times by `Slot.time`."""

    record: Record
    times_s: Floats


class Clock:
    """Times of batches of one rank of a model on one machine; what a `guesser` adds is not among them."""

    def __init__(self, model: ModelShape, machine: Machine, guesser: Guesser | None = None) -> None:
        self.model, self.machine, self.guesser = model, machine, guesser
        self._programs: dict[tuple[range, tuple[int, ...]], Program] = {}
        self._prices: dict[tuple[range, tuple[int, ...]], Prices] = {}
        self._kept: list[Structure] = []  # ids above stay valid while these live
        self._shapes = Counter(model.layers)
        self._times = own_times(model, machine)
        self._layers: dict[int, tuple[range, Layers]] = {}  # by the first number of tokens
        self._heads: dict[int, tuple[range, Records]] = {}
        self._alone = machine.sharing(machine.tp, machine.on_switch)  # only the replica's own ranks are on the host

    def iteration(
        self, loads: Sequence[Load], tokens: int, logits: int, sharing: Floats | None = None
    ) -> tuple[float, Floats]:
        """Duration of one iteration and the seconds that it keeps each of BUSY occupied.

        Every layer runs for `tokens` new tokens under `loads`, then the head for `logits` rows; `sharing` says what
        there is of the host (`Machine.sharing`), by default all that other ranks of the replica leave.
        """
        busy = np.empty(len(BUSY))
        _, seconds = self._price(loads, tokens, logits, self._alone if sharing is None else sharing, busy)
        return seconds, busy

    def work(
        self, loads: Sequence[Load], tokens: int, sharing: Floats | None = None, layers: range | None = None
    ) -> Iteration:
        """The operations of an iteration of all layers, or of these, by default as if alone on the host.

        (The op fidelity shares it itself.)
        """
        if sharing is None:
            sharing = self.machine.sharing(1, 1)
        prices, _ = self._price(loads, tokens, 0, sharing, np.empty(len(BUSY)), layers)
        program = self.program([load.structure for load in loads], layers)
        sent_bytes, fixed_s, nbytes = self.machine.allreduce_bytes(self.model, tokens), [0.0], [0]
        reduce_fixed_s = self.machine.allreduce_fixed_s(self.machine.allreduce_s(self.model, tokens), sent_bytes)
        for _ in self._shapes:  # only their all-reduces transfer anything
            fixed_s += [0.0] * (PARTS - 1) + [reduce_fixed_s]
            nbytes += [0] * (PARTS - 1) + [sent_bytes]
        for structure, amounts in loads:
            fixed_s += [op.cost.fixed_s for op in structure.ops]
            moved = amounts[: -len(TIERS)].reshape(-1, AMOUNTS)
            nbytes += (moved[:, 1] + moved[:, 2]).tolist()
        return Iteration(program, prices, prices.seconds[: len(fixed_s)].tolist(), fixed_s, nbytes)

    def head_s(self, logits: int) -> float:
        """Time of the output head for `logits` positions."""
        return float(self.head(logits)["seconds"])

    def head(self, logits: int) -> Record:
        """What the output head takes for `logits` positions: fields of HEAD."""
        numbers, records = self.heads_around(logits)
        return records[logits - numbers.start]

    def own_layers(self, tokens: int) -> Own:
        """What the model's own layers take."""
        numbers, layers = self.layers_around(tokens)
        return Own(layers.records[tokens - numbers.start], layers.times_s[tokens - numbers.start])

    def layers_around(self, tokens: int) -> tuple[range, Layers]:
        """The same for all numbers of tokens that are priced together with this one."""
        numbers = self._around(tokens)
        if numbers.start not in self._layers:
            self._layers[numbers.start] = numbers, self._times.layers(numbers)
        return self._layers[numbers.start]

    def heads_around(self, logits: int) -> tuple[range, Records]:
        """HEAD for all numbers of positions that are priced together with this one."""
        numbers = self._around(logits)
        if numbers.start not in self._heads:
            self._heads[numbers.start] = numbers, self._times.head(numbers)
        return self._heads[numbers.start]

    def _around(self, number: int) -> range:
        together = self._times.together
        first = (number - 1) // together * together + 1 if number else 0
        return range(first, first + together if number else 1)

    def program(self, structures: Sequence[Structure], layers: range | None = None) -> Program:
        """The order of work of an iteration in which every layer, or these, run the operations of all `structures`."""
        layers = layers or range(self.model.n_layers)
        key = layers, tuple(id(s) for s in structures)
        found = self._programs.get(key)
        if found is None:
            self._kept += structures
            found = self._programs[key] = compile_program(self.model, structures, self.machine.tp, layers)
        return found

    def prices(
        self,
        stages: Sequence[range],
        structures: Sequence[Structure],
        combinations: Sequence[tuple[int, ...]],
        known: tuple[Records, Records, Floats],
    ) -> Prices:
        """Costs of the structures, and programs for those combinations of them on each stage.

        `known` is what is known of the head and of the model's own layers: `head`, `own` and `own_s`.

        Raises ValueError for a structure that works on all layers at once where stages have only theirs.
        """
        if len(stages) > 1 and any(structure.end for structure in structures):
            raise ValueError("the policy works on all layers at once after a prompt, and no stage has all; use pp=1")
        programs = [
            [self.program([structures[i] for i in combination], held) for held in stages]
            for combination in combinations
        ]
        return lay_out(structures, stages, combinations, programs, known)

    def _price(
        self,
        loads: Sequence[Load],
        tokens: int,
        logits: int,
        sharing: Floats,
        busy: Floats,
        layers: range | None = None,
    ) -> tuple[Prices, float]:
        structures, own = [load.structure for load in loads], self.own_layers(tokens)
        layers = layers or range(self.model.n_layers)
        key = layers, tuple(id(structure) for structure in structures)
        prices = self._prices.get(key)
        if prices is None:
            self._kept += structures
            nothing = np.zeros(0, HEAD), np.zeros(0, OWN), np.zeros((0, 0))
            prices = self._prices[key] = self.prices([layers], structures, [tuple(range(len(loads)))], nothing)
        rows = np.zeros((len(loads), 1 + max((s.columns for s in structures), default=0)), np.int64)
        for index, load in enumerate(loads):
            rows[index, 0] = index
            rows[index, 1 : 1 + len(load.amounts)] = np.roll(load.amounts, len(TIERS))
        batch = Batch(prices.programs[0], own.record, own.times_s, rows, 1.0, 0, self.head(logits), logits)
        return prices, price(prices, batch, sharing, busy)
