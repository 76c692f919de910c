"""How long one iteration of a batch takes, and what it keeps busy: plans priced on a machine, then put in order."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.machine import (
    ALONE,
    CPU,
    D2H,
    H2D,
    LANES,
    MLP_KERNELS,
    NVLINK,
    OUT_KERNELS,
    QKV_KERNELS,
    SM,
    Machine,
    Sharing,
    by_type,
)
from kvsim.iteration.program import Floats, Program, compile_program, makespan_s
from kvsim.plans.derive import AMOUNTS, LINKS, TIERS, Structure, Vector
from kvsim.plans.guessing import Guesser
from policies.model import LayerShape, ModelShape

BUSY = (*LANES, "work", "hbm")  # lanes, then the SMs' arithmetic and the HBM's transfers within the SM lane
WORK, HBM = len(LANES), len(LANES) + 1


class Load(NamedTuple):
    """The summed vectors of sequences whose plans share one structure."""

    structure: Structure
    amounts: Vector


class Prices(NamedTuple):
    """A structure's costs as arrays over its operations."""

    fixed_s: Floats
    rates_s: Floats  # (AMOUNTS x operations): seconds per unit of each column
    always: NDArray[np.bool_]
    lanes: Floats  # (lanes, operations): layers that run the operation on the lane
    inside: Floats  # (2, columns): layers whose SMs spend the column's time on arithmetic, and on HBM
    traffic: Vector  # (links, columns and tiers): bytes per link of all layers

    def seconds(self, amounts: Vector) -> tuple[Floats, Floats]:
        """For each operation the time that it takes, and for each column the time that it would take alone."""
        alone = amounts * self.rates_s
        arithmetic, transfers = alone[::AMOUNTS], alone[1::AMOUNTS] + alone[2::AMOUNTS]
        longer = np.maximum(arithmetic, transfers)
        return longer + self.fixed_s * (self.always | (longer > 0)), alone


class Iteration(NamedTuple):
    """One iteration's operations: their order, and for each what `Slot.time` indexes."""

    program: Program
    seconds: list[float]
    fixed_s: list[float]  # the part that is no transfer
    nbytes: list[int]


def _amounts(loads: Sequence[Load]) -> Vector:
    if not loads:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([load.amounts[: -len(TIERS)] for load in loads])


_NO_PRICES = Prices(
    fixed_s=np.zeros(0),
    rates_s=np.zeros(0),
    always=np.zeros(0, np.bool_),
    lanes=np.zeros((len(LANES), 0)),
    inside=np.zeros((2, 0)),
    traffic=np.zeros((len(LINKS), 0), np.int64),
)


class Clock:
    """Times of batches of one rank of a model on one machine; what a `guesser` adds is not among them."""

    def __init__(self, model: ModelShape, machine: Machine, guesser: Guesser | None = None) -> None:
        self.model, self.machine, self.guesser = model, machine, guesser
        self._programs: dict[tuple[range, tuple[int, ...]], Program] = {}
        self._compilations: dict[tuple[Sharing, tuple[int, ...]], tuple[Program, Prices]] = {}
        self._prices: dict[int, Prices] = {}
        self._kept: list[Structure] = []  # ids above stay valid while these live
        self._shapes = Counter(model.layers)
        self._head_bytes = model.head_bytes
        self._multiplied = by_type(  # weights by a token in the layers
            (dtype, n * params // x.tokens_per_run)
            for x, n in self._shapes.items()
            for dtype, params in model.products(x)
        )
        one, two = (machine.head_s(model, logits) for logits in (1, 2))
        self.head_parts_s = (2 * one - two, two - one)  # once, and for each position
        self._model_times: dict[int, tuple[Floats, Floats, int]] = {}

    def traffic(self, load: Load) -> Vector:
        """Bytes per link of LINKS that a load moves, over all layers."""
        return self.prices(load.structure).traffic @ load.amounts

    def iteration(
        self, loads: Sequence[Load], tokens: int, logits: int, sharing: Sharing | None = None
    ) -> tuple[float, Floats]:
        """Duration of one iteration and the seconds that it keeps each of BUSY occupied.

        Every layer runs for `tokens` new tokens under `loads`, then the head for `logits` rows; `sharing` says who else
        uses the host, by default only the replica's own ranks.
        """
        model_times, busy, _ = self.own_layers(tokens)
        busy = busy.copy()
        head_s = self.head_s(logits) if logits else 0.0
        if logits:
            busy[SM] += head_s
            busy[HBM] += self.head_parts_s[0]
        times = model_times
        program, prices = self._compiled([load.structure for load in loads], sharing or self.machine.sharing)
        if loads:
            seconds, alone = prices.seconds(_amounts(loads))
            busy[: len(LANES)] += prices.lanes @ seconds
            busy[len(LANES) :] += prices.inside @ alone
            times = np.concatenate([model_times, seconds])
        return makespan_s(program, times) + head_s, busy

    def work(self, loads: Sequence[Load], tokens: int, sharing: Sharing = ALONE) -> Iteration:
        """The operations of an iteration, by default as if alone on the host: whoever schedules shares by himself."""
        model_times, _, _ = self.own_layers(tokens)
        program, prices = self._compiled([load.structure for load in loads], sharing)
        amounts = _amounts(loads)
        latency_s, _ = self.machine.peer
        fixed_s, nbytes = [0.0], [0]
        for _ in self._shapes:  # only their all-reduces transfer anything
            fixed_s += [0.0, 0.0, 0.0, 2 * latency_s]
            nbytes += [0, 0, 0, self.machine.allreduce_bytes(self.model, tokens)]
        return Iteration(
            program,
            [*model_times.tolist(), *prices.seconds(amounts)[0].tolist()],
            fixed_s + prices.fixed_s.tolist(),
            nbytes + (amounts[1::AMOUNTS] + amounts[2::AMOUNTS]).tolist(),
        )

    def head_s(self, logits: int) -> float:
        """Time of the output head for `logits` positions, at least one."""
        return self.head_parts_s[0] + logits * self.head_parts_s[1]

    def own_layers(self, tokens: int) -> tuple[Floats, Floats, int]:
        """Of the model's own layers: the time of each part by `Slot.time`, seconds of BUSY, bytes of weights read."""
        found = self._model_times.get(tokens)
        if found is None:
            model, machine = self.model, self.machine
            times, busy, weights = [0.0], np.zeros(len(BUSY)), 0
            reduce_s = machine.allreduce_s(model, tokens)
            for shape, n in self._shapes.items():
                parts = machine.layer_s(model, shape, tokens)
                times += [*parts, reduce_s]
                busy[SM] += n * sum(parts)
                busy[NVLINK] += n * 2 * reduce_s
                weights += n * model_bytes(model, shape, tokens)
            busy[HBM] = weights / machine.gpu.rates.hbm_Bps
            busy[WORK] = machine.products_s([(dtype, 2 * n * tokens) for dtype, n in self._multiplied.items()])
            found = self._model_times[tokens] = (np.array(times), busy, weights)
        return found

    def own_bounds_s(self, tokens: int) -> tuple[float, float]:
        """Of the model's own layers: seconds of arithmetic and of streaming weights; the rest are launches."""
        _, busy, _ = self.own_layers(tokens)
        kernels = sum(
            n * x.share_run(tokens) * (QKV_KERNELS + OUT_KERNELS + (MLP_KERNELS if x.mlp_params else 0))
            for x, n in self._shapes.items()
        )
        hbm_s = float(busy[HBM])
        return float(busy[SM]) - hbm_s - kernels * self.machine.gpu.rates.launch_s, hbm_s

    def prices(self, structure: Structure) -> Prices:
        """The structure's costs as arrays."""
        prices = self._prices.get(id(structure))
        if prices is None:
            self._kept.append(structure)
            costs = [op.cost for op in structure.ops]
            lanes = np.zeros((len(LANES), len(costs)))
            traffic = np.zeros((len(LINKS), AMOUNTS * len(costs) + len(TIERS)), dtype=np.int64)
            for i, (op, n) in enumerate(zip(structure.ops, structure.multiplicity(), strict=True)):
                lanes[op.cost.lane, i] = n
                traffic[op.link, AMOUNTS * i + 1 : AMOUNTS * i + AMOUNTS] = n
            rates_s = [seconds for c in costs for seconds in (c.work_s, c.streamed_s, c.scattered_s)]
            inside = np.zeros((2, AMOUNTS * len(costs)))
            inside[0, ::AMOUNTS] = inside[1, 1::AMOUNTS] = inside[1, 2::AMOUNTS] = lanes[SM]
            prices = Prices(
                fixed_s=np.array([c.fixed_s for c in costs], dtype=np.float64),
                rates_s=np.array(rates_s, dtype=np.float64),
                always=np.array([op.syncs for op in structure.ops], dtype=np.bool_),
                lanes=lanes,
                inside=inside,
                traffic=traffic,
            )
            self._prices[id(structure)] = prices
        return prices

    def weight_bytes(self, tokens: int, logits: int) -> int:
        """Bytes of weights that one iteration reads."""
        return self.own_layers(tokens)[2] + (self._head_bytes if logits else 0)

    def collective_bytes(self, tokens: int) -> int:
        """Bytes that one rank sends in all-reduces, two a layer, in one iteration."""
        return 2 * self.model.n_layers * self.machine.allreduce_bytes(self.model, tokens)

    def _compiled(self, structures: Sequence[Structure], sharing: Sharing) -> tuple[Program, Prices]:
        key = tuple(id(s) for s in structures)
        found = self._compilations.get((sharing, key))
        if found is None:
            program = self.program(structures)
            prices = [self.prices(s) for s in structures]
            joined = Prices(*(np.concatenate(c, axis=-1) for c in zip(*prices, strict=True))) if prices else _NO_PRICES
            found = self._compilations[sharing, key] = (program, self._shared(joined, sharing))
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

    def _shared(self, prices: Prices, sharing: Sharing) -> Prices:
        """Prices when others use the host: copies go no faster than a fair share, the CPU is divided evenly."""
        copies, cpu = prices.lanes[[H2D, D2H]].any(axis=0), prices.lanes[CPU] > 0
        floor_s = self.machine.copy_floor_s(sharing)

        def shared(seconds: Floats) -> Floats:
            return np.where(copies, np.maximum(seconds, floor_s), np.where(cpu, sharing.host * seconds, seconds))

        work_s, streamed_s, scattered_s = prices.rates_s.reshape(-1, AMOUNTS).T
        work_s = np.where(cpu, sharing.host * work_s, work_s)
        rates_s = np.stack([work_s, shared(streamed_s), shared(scattered_s)], axis=1)
        return prices._replace(rates_s=rates_s.reshape(-1))

    def uses_host(self, structures: Sequence[Structure]) -> bool:
        """Whether any operation of these structures runs on PCIe or on the CPU."""
        return any(op.cost.lane in (H2D, D2H, CPU) for s in structures for op in s.ops)


def model_bytes(model: ModelShape, layer: LayerShape, tokens: int) -> int:
    """Bytes of weights that one layer reads for a batch of `tokens`."""
    return round(layer.share_run(tokens) * model.layer_bytes_touched(layer, tokens))
