"""How long batches take on one rank of a model and its machine: what `price` needs for that, and its answers.

The inner loop calls `price` by itself, with arrays for all that it meets; here is the same for a few loads at a time.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvsim.hardware.machine import (
    HEAD_KERNELS,
    MLP_KERNELS,
    NVLINK,
    OUT_KERNELS,
    QKV_KERNELS,
    SM,
    Machine,
    by_type,
)
from kvsim.iteration.arrays import Floats, Record, Records
from kvsim.iteration.busy import BUSY, BY_COMPUTE, BY_HBM, HBM_BUSY, WORK
from kvsim.iteration.layout import lay_out
from kvsim.iteration.price import HEAD, OWN, PARTS, Batch, Prices, head_s, price
from kvsim.iteration.program import Program, compile_program
from kvsim.plans.derive import AMOUNTS, TIERS, Structure, Vector
from kvsim.plans.guessing import Guesser
from policies.model import LayerShape, ModelShape


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
        self._prices: dict[tuple[int, ...], Prices] = {}
        self._kept: list[Structure] = []  # ids above stay valid while these live
        self._shapes = Counter(model.layers)
        self._multiplied = by_type(  # weights by a token in the layers
            (dtype, n * params // x.tokens_per_run)
            for x, n in self._shapes.items()
            for dtype, params in model.products(x)
        )
        one, two = (machine.head_s(model, logits) for logits in (1, 2))
        launch_s = HEAD_KERNELS * machine.gpu.rates.launch_s
        self._head: Record = np.array([(2 * one - two, two - one, launch_s)], dtype=HEAD)[0]
        self._own: dict[int, Own] = {}
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

    def work(self, loads: Sequence[Load], tokens: int, sharing: Floats | None = None) -> Iteration:
        """The operations of an iteration, by default as if alone on the host: the op fidelity shares it itself."""
        if sharing is None:
            sharing = self.machine.sharing(1, 1)
        prices, _ = self._price(loads, tokens, 0, sharing, np.empty(len(BUSY)))
        program = self.program([load.structure for load in loads])
        latency_s, _ = self.machine.peer
        fixed_s, nbytes = [0.0], [0]
        for _ in self._shapes:  # only their all-reduces transfer anything
            fixed_s += [0.0] * (PARTS - 1) + [2 * latency_s]
            nbytes += [0] * (PARTS - 1) + [self.machine.allreduce_bytes(self.model, tokens)]
        for structure, amounts in loads:
            fixed_s += [op.cost.fixed_s for op in structure.ops]
            moved = amounts[: -len(TIERS)].reshape(-1, AMOUNTS)
            nbytes += (moved[:, 1] + moved[:, 2]).tolist()
        return Iteration(program, prices, prices.seconds[: len(fixed_s)].tolist(), fixed_s, nbytes)

    def head_s(self, logits: int) -> float:
        """Time of the output head for `logits` positions."""
        return head_s(self._head, logits)

    def own_layers(self, tokens: int) -> Own:
        """What the model's own layers take."""
        found = self._own.get(tokens)
        if found is None:
            model, machine, rates = self.model, self.machine, self.machine.gpu.rates
            times, busy, weight_bytes, kernels = [0.0], np.zeros(len(BUSY)), 0, 0.0
            reduce_s = machine.allreduce_s(model, tokens)
            for shape, n in self._shapes.items():
                parts = machine.layer_s(model, shape, tokens)
                times += [*parts, reduce_s]
                busy[SM] += n * sum(parts)
                busy[NVLINK] += n * 2 * reduce_s
                weight_bytes += n * model_bytes(model, shape, tokens)
                each = QKV_KERNELS + OUT_KERNELS + (MLP_KERNELS if shape.mlp_params else 0)
                kernels += n * shape.share_run(tokens) * each
            busy[HBM_BUSY] = busy[BY_HBM] = weight_bytes / rates.hbm_Bps
            busy[WORK] = machine.products_s([(dtype, 2 * n * tokens) for dtype, n in self._multiplied.items()])
            busy[BY_COMPUTE] = busy[SM] - busy[BY_HBM] - kernels * rates.launch_s
            sent_bytes = 2 * model.n_layers * machine.allreduce_bytes(model, tokens)  # two all-reduces a layer
            record = np.array([(1, weight_bytes, sent_bytes, busy)], dtype=OWN)[0]
            found = self._own[tokens] = Own(record, np.array(times))
        return found

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
        own: Records,
        own_s: Floats,
    ) -> Prices:
        """Costs of the structures, and programs for those combinations of them on each stage.

        `own` and `own_s` are what is known of the model's own layers. Raises ValueError for a structure that works on
        all layers at once where stages have only theirs.
        """
        if len(stages) > 1 and any(structure.end for structure in structures):
            raise ValueError("the policy works on all layers at once after a prompt, and no stage has all; use pp=1")
        programs = [
            [self.program([structures[i] for i in combination], held) for held in stages]
            for combination in combinations
        ]
        return lay_out(structures, stages, combinations, programs, (self._head, own, own_s))

    def _price(
        self, loads: Sequence[Load], tokens: int, logits: int, sharing: Floats, busy: Floats
    ) -> tuple[Prices, float]:
        structures, own = [load.structure for load in loads], self.own_layers(tokens)
        key = tuple(id(structure) for structure in structures)
        prices = self._prices.get(key)
        if prices is None:
            self._kept += structures
            whole = [range(self.model.n_layers)]
            nothing = np.zeros(0, OWN), np.zeros((0, 0))
            prices = self._prices[key] = self.prices(whole, structures, [tuple(range(len(loads)))], *nothing)
        rows = np.zeros((len(loads), 1 + max((s.columns for s in structures), default=0)), np.int64)
        for index, load in enumerate(loads):
            rows[index, 0] = index
            rows[index, 1 : 1 + len(load.amounts)] = np.roll(load.amounts, len(TIERS))
        batch = Batch(prices.programs[0], own.record, own.times_s, rows, 1.0, 0, logits)
        return prices, price(prices, batch, sharing, busy)


def model_bytes(model: ModelShape, layer: LayerShape, tokens: int) -> int:
    """Bytes of weights that one layer reads for a batch of `tokens`."""
    return round(layer.share_run(tokens) * model.layer_bytes_touched(layer, tokens))
