"""Keeps what each step of each layer drew, without waiting for the device, until somebody asks."""

from collections.abc import Sequence

import numpy as np
import torch

from policies import LayerPlan, Step
from traces.counts import Drawn, Recording


class Recorder:
    """The steps of all caches of one `offload`, and their counts; a cache's sequences get consecutive numbers."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, int, int, Step]] = []  # first sequence, sequences, layer, step
        self._drawn: dict[str, list[tuple[int, torch.Tensor, int]]] = {}  # index into `_steps`, values, maximum
        self._sequences = 0

    def admit(self, sequences: int) -> int:
        """The number of the first of a new cache's sequences."""
        first, self._sequences = self._sequences, self._sequences + sequences
        return first

    def note(
        self, first: int, sequences: int, layer: int, step: Step, plan: LayerPlan, counts: dict[str, torch.Tensor]
    ) -> None:
        """One layer has done one step.

        Raises RuntimeError when a count that the plan declares was not drawn, or has another number of heads.
        """
        for count in plan.counts:
            value = counts.get(count.name)
            if value is None or tuple(value.shape) != (sequences, count.heads):
                shape = None if value is None else tuple(value.shape)
                raise RuntimeError(
                    f"count {count.name!r} has shape {shape} where its plan has {(sequences, count.heads)}"
                )
            self._drawn.setdefault(count.name, []).append((len(self._steps), value, count.maximum))
        self._steps.append((first, sequences, layer, step))

    def recording(self) -> Recording:
        """Everything so far."""
        rows: list[tuple[int, int, int, int, int]] = []
        begins = []
        for first, sequences, layer, step in self._steps:
            begins.append(len(rows))
            at = (layer, step.prompt_tokens, step.past_tokens, step.new_tokens)
            rows += [(first + i, *at) for i in range(sequences)]
        steps = np.array(rows, dtype=np.int64).reshape(-1, 5)
        return Recording(steps, {name: _joined(drawn, begins) for name, drawn in self._drawn.items()})


def _joined(drawn: Sequence[tuple[int, torch.Tensor, int]], begins: Sequence[int]) -> Drawn:
    heads = max(value.shape[1] for _, value, _ in drawn)
    row, values, maximum = [], [], []
    for index, value, most in drawn:
        row.append(begins[index] + np.arange(len(value)))
        values.append(np.pad(value.cpu().numpy().astype(np.int64), ((0, 0), (0, heads - value.shape[1]))))
        maximum.append(np.full(len(value), most))
    return Drawn(*(np.concatenate(part).astype(np.int64) for part in (row, values, maximum)))
