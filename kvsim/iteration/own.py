"""What the model's own layers and its head take, by the tokens of an iteration: tables that the loop looks up.

By a parameter set's rates, or by a serving engine's kernels, which are priced for many numbers of tokens at once.
"""

from collections import Counter
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

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
from kvsim.hardware.served import ServedModel
from kvsim.iteration.arrays import Floats, Records
from kvsim.iteration.busy import BY_COMPUTE, BY_HBM, HBM_BUSY, WORK
from kvsim.iteration.price import HEAD, OWN, PARTS
from policies.model import LayerShape, ModelShape


class Layers(NamedTuple):
    """Of the model's own layers, for some numbers of tokens in a row: fields of OWN, and times by `Slot.time`."""

    records: Records
    times_s: Floats  # (numbers, times)


class OwnTimes(Protocol):
    """Prices of one rank's own layers and head."""

    together: int  # numbers in a row that it pays to ask for at once

    def layers(self, tokens: range) -> Layers:
        """For each of these numbers of tokens."""

    def head(self, logits: range) -> Records:
        """HEAD for each of these numbers of positions."""


def own_times(model: ModelShape, machine: Machine) -> OwnTimes:
    """By kernels where the GPU's parameter set has constants for them, else by its rates; as slow as the machine is."""
    priced = RatedTimes(model, machine) if machine.served is None else ServedTimes(model, machine, machine.served)
    if machine.kernel_slowdown == 1 and machine.layer_overhead_s == 0:
        return priced
    return SlowedTimes(priced, model, machine)


class RatedTimes:
    """By rates: weights stream in, then they multiply."""

    together = 8

    def __init__(self, model: ModelShape, machine: Machine) -> None:
        self._model, self._machine = model, machine
        self._shapes = Counter(model.layers)
        self._multiplied = by_type(  # weights by a token in the layers
            (dtype, n * params // x.tokens_per_run)
            for x, n in self._shapes.items()
            for dtype, params in model.products(x)
        )
        one, two = (machine.head_s(model, logits) for logits in (1, 2))
        self._head_s = 2 * one - two, two - one

    def layers(self, tokens: range) -> Layers:
        """For each of these numbers of tokens."""
        records, times_s = np.zeros(len(tokens), OWN), np.zeros((len(tokens), 1 + PARTS * len(self._shapes)))
        weight_bytes, busy_s = records["weight_bytes"], records["busy_s"]
        for i, n in enumerate(tokens):
            weight_bytes[i] = self._enter(n, times_s[i], busy_s[i])
        records["known"] = 1
        records["collective_bytes"] = _sent_bytes(self._model, self._machine, tokens)
        return Layers(records, times_s)

    def _enter(self, tokens: int, times_s: Floats, busy: Floats) -> int:
        """Set what so many tokens take and keep busy; the bytes of weights that they read."""
        model, machine, rates = self._model, self._machine, self._machine.gpu.rates
        weight_bytes, kernels, sms_s, reduces_s = 0, 0.0, 0.0, 0.0
        reduce_s, times = machine.allreduce_s(model, tokens), [0.0]
        for shape, n in self._shapes.items():
            parts = machine.layer_s(model, shape, tokens)
            times += [*parts, reduce_s]
            sms_s += n * sum(parts)
            reduces_s += n * 2 * reduce_s
            weight_bytes += n * model_bytes(model, shape, tokens)
            each = QKV_KERNELS + OUT_KERNELS + (MLP_KERNELS if shape.mlp_params else 0)
            kernels += n * shape.share_run(tokens) * each
        times_s[:] = times
        busy[SM], busy[NVLINK] = sms_s, reduces_s
        busy[HBM_BUSY] = busy[BY_HBM] = reading_s = weight_bytes / rates.hbm_Bps
        busy[WORK] = machine.products_s([(dtype, 2 * n * tokens) for dtype, n in self._multiplied.items()])
        busy[BY_COMPUTE] = sms_s - reading_s - kernels * rates.launch_s
        return weight_bytes

    def head(self, logits: range) -> Records:
        """HEAD for each of these numbers of positions."""
        once_s, each_s = self._head_s
        launch_s = HEAD_KERNELS * self._machine.gpu.rates.launch_s
        rows = [
            (1, once_s + n * each_s, once_s, once_s - launch_s, n * each_s) if n else (1, *[0.0] * 4) for n in logits
        ]
        return np.array(rows, dtype=HEAD)


class ServedTimes:
    """By kernels."""

    together = 128

    def __init__(self, model: ModelShape, machine: Machine, served: ServedModel) -> None:
        self._model, self._machine, self._served = model, machine, served
        self._shapes = Counter(model.layers)

    def layers(self, tokens: range) -> Layers:
        """For each of these numbers of tokens."""
        model, machine, rows = self._model, self._machine, np.arange(tokens.start, tokens.stop)
        records = np.zeros(len(rows), OWN)
        busy, times = records["busy_s"], np.zeros((len(rows), 1 + PARTS * len(self._shapes)))
        reduce_s = np.array([machine.allreduce_s(model, n) for n in tokens])
        for i, (shape, n) in enumerate(self._shapes.items()):
            for j, part in enumerate(self._served.layer(model, shape, rows)):
                times[:, 1 + PARTS * i + j] = part.seconds
                for lane, seconds in (
                    (SM, part.seconds),
                    (HBM_BUSY, part.hbm_s),
                    (WORK, part.work_s),
                    (BY_HBM, part.by_hbm_s),
                    (BY_COMPUTE, part.by_compute_s),
                ):
                    busy[:, lane] += n * seconds
            times[:, PARTS * (i + 1)] = reduce_s
            busy[:, NVLINK] += n * 2 * reduce_s
            records["weight_bytes"] += n * _bytes_of(model, shape, tokens)
        records["known"] = 1
        records["collective_bytes"] = _sent_bytes(model, machine, tokens)
        return Layers(records, times)

    def head(self, logits: range) -> Records:
        """HEAD for each of these numbers of positions."""
        found, rows = np.zeros(len(logits), HEAD), np.arange(logits.start, logits.stop)
        part, some = self._served.head(self._model, np.maximum(rows, 1)), rows > 0
        for name, seconds in (
            ("seconds", part.seconds),
            ("hbm_s", part.hbm_s),
            ("by_hbm_s", part.by_hbm_s),
            ("by_compute_s", part.by_compute_s),
        ):
            found[name] = some * seconds
        found["known"] = 1
        return found


class SlowedTimes:
    """Those of another one on a machine whose kernels take longer, and whose host adds something to each layer."""

    def __init__(self, priced: OwnTimes, model: ModelShape, machine: Machine) -> None:
        self.together = priced.together
        self._priced, self._machine = priced, machine
        self._shapes = Counter(model.layers)

    def layers(self, tokens: range) -> Layers:
        """For each of these numbers of tokens; the host's part comes before a layer's own first kernels."""
        records, times_s = self._priced.layers(tokens)
        slowdown, overhead_s = self._machine.kernel_slowdown, self._machine.layer_overhead_s
        records["busy_s"] *= slowdown
        times_s *= slowdown
        times_s[:, 1::PARTS] += overhead_s
        records["busy_s"][:, SM] += self._shapes.total() * overhead_s
        return Layers(records, times_s)

    def head(self, logits: range) -> Records:
        """HEAD for each of these numbers of positions."""
        found = self._priced.head(logits)
        for name in ("seconds", "hbm_s", "by_hbm_s", "by_compute_s"):
            found[name] *= self._machine.kernel_slowdown
        return found


def model_bytes(model: ModelShape, layer: LayerShape, tokens: int) -> int:
    """Bytes of weights that one layer reads for a batch of `tokens`."""
    return round(layer.share_run(tokens) * model.layer_bytes_touched(layer, tokens))


def _bytes_of(model: ModelShape, layer: LayerShape, tokens: range) -> NDArray[np.int64]:
    if not layer.experts and layer.tokens_per_run == 1:
        return np.full(len(tokens), model_bytes(model, layer, 1))
    return np.array([model_bytes(model, layer, n) for n in tokens])


def _sent_bytes(model: ModelShape, machine: Machine, tokens: range) -> list[int]:
    """Bytes of the two all-reduces of each layer."""
    if machine.tp == 1:
        return [0] * len(tokens)
    return [2 * model.n_layers * machine.allreduce_bytes(model, n) for n in tokens]
