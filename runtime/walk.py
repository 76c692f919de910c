"""One decode step of all layers whose kernels know no length: what a graph records."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.bound import Bound
from runtime.call import Call, CapturedStep, Handed, Lengths, Method
from runtime.executor import Executor
from runtime.layer import TieredLayer

if TYPE_CHECKING:
    from runtime.cache import TieredCache


class Walk:
    """The step of one cache: while the cache has it, attention calls come to it."""

    def __init__(self, cache: "TieredCache", bounds: dict[int, Bound], past: Tensor, mask: Tensor | None) -> None:
        self.row = past
        self._bounds, self._mask, self._lengths = bounds, mask, Lengths(past)
        self._shapes, self._rotaries = cache.terms.shape.layers, cache.rotaries
        self._executor = Executor(cache.device, cache.terms.mover)
        self._counts: list[tuple[int, str, Tensor]] = []  # by layer and name
        self._drawn: Tensor | None = None  # all of them in a row

    def run(self, layer: TieredLayer, handed: Handed) -> Tensor:
        """One attention call."""
        bound = self._bounds[layer.index]
        call = Call(
            shape=self._shapes[layer.index],
            step=CapturedStep(layer.prompt_tokens),
            state=bound.state,
            rotary=self._rotaries.of.get(layer.index),
            lengths=self._lengths,
            **handed._replace(mask=self._mask)._asdict(),
        )
        self._executor.run(bound, call)
        self._counts += [(layer.index, count.name, call.counts[count.name]) for count in bound.counted.counts]
        assert call.out is not None  # noqa: S101 - the executor has checked it
        return call.out

    def finish(self) -> None:
        """All layers have come: what was drawn is put together, and the lanes run into one."""
        self._executor.gather_lanes()
        if self._counts:
            self._drawn = torch.cat([value.flatten() for _, _, value in self._counts])

    def drawn(self) -> dict[int, dict[str, Tensor]]:
        """The counts of the last run by layer and name, in memory of their own."""
        found: dict[int, dict[str, Tensor]] = {layer: {} for layer in self._bounds}
        if self._drawn is not None:
            values = self._drawn.clone().split([value.numel() for _, _, value in self._counts])
            for (layer, name, value), now in zip(self._counts, values, strict=True):
                found[layer][name] = now.view(value.shape)
        return found


def prepared(method: Method) -> Method:
    """The method with its kernels that know no length."""
    return replace(method, kernels={**method.kernels, **(method.captured or {})})
