"""Keeps what each step of each layer drew, without waiting for the device, until somebody asks."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from policies import Step
from policies.plan import Count
from traces.counts import COLUMNS, Drawn, Recording


class At(NamedTuple):
    """Whose step it is: `sequences` of one cache from number `first_sequence` on, on one layer.

    `first_prompt_tokens` is the prompt of their first turn.
    """

    first_sequence: int
    sequences: int
    layer: int
    first_prompt_tokens: int


class Recorder:
    """The steps of all caches of one `offload`, and their counts; a cache's sequences get consecutive numbers."""

    def __init__(self) -> None:
        self._steps: list[tuple[At, Step]] = []
        self._drawn: dict[str, list[tuple[int, torch.Tensor, int]]] = {}  # index into `_steps`, values, maximum
        self._sequences = 0
        self._lock = threading.Lock()  # caches may be used by threads of their own

    def admit(self, sequences: int) -> int:
        """The number of the first of a new cache's sequences."""
        with self._lock:
            first, self._sequences = self._sequences, self._sequences + sequences
        return first

    def note(self, at: At, step: Step, declared: Sequence[Count], counts: dict[str, torch.Tensor]) -> None:
        """One layer has done one step.

        Raises RuntimeError when a count that the plan declares was not drawn, or has another number of heads.
        """
        for count in declared:
            value = counts.get(count.name)
            if value is None or tuple(value.shape) != (at.sequences, count.heads):
                shape = None if value is None else tuple(value.shape)
                raise RuntimeError(
                    f"count {count.name!r} has shape {shape} where its plan has {(at.sequences, count.heads)}"
                )
        with self._lock:
            for count in declared:
                drawn = self._drawn.setdefault(count.name, [])
                drawn.append((len(self._steps), counts[count.name], count.maximum))
            self._steps.append((at, step))

    def recording(self) -> Recording:
        """Everything so far."""
        with self._lock:
            noted, drawn = list(self._steps), {name: list(values) for name, values in self._drawn.items()}
        rows: list[tuple[int, ...]] = []
        begins = []
        for at, step in noted:
            begins.append(len(rows))
            row = (at.layer, at.first_prompt_tokens, step.prompt_tokens, step.past_tokens, step.new_tokens)
            rows += [(at.first_sequence + i, *row) for i in range(at.sequences)]
        steps = np.array(rows, dtype=np.int64).reshape(-1, len(COLUMNS))
        return Recording(steps, {name: _joined(values, begins) for name, values in drawn.items()})


def _joined(drawn: Sequence[tuple[int, torch.Tensor, int]], begins: Sequence[int]) -> Drawn:
    heads = max(value.shape[1] for _, value, _ in drawn)
    row, values, maximum = [], [], []
    for index, value, most in drawn:
        absent = ((0, 0), (0, heads - value.shape[1]))  # heads that this layer lacks
        row.append(begins[index] + np.arange(len(value), dtype=np.int64))
        values.append(np.pad(value.cpu().numpy().astype(np.int64), absent))
        maximum.append(np.pad(np.full(value.shape, most, dtype=np.int64), absent))
    return Drawn(np.concatenate(row), np.concatenate(values), np.concatenate(maximum))
