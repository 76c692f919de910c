"""Allocates what a policy's plan stores, and nothing else."""

from collections import Counter
from collections.abc import Sequence

import torch

from policies.plan import Buffer, Tier

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}


class Arena:
    """The buffers of all layers for one batch: `hbm` on the model's device, `ddr` in host memory, pinned beside a GPU.

    A tensor has shape (batch, rows, *row_shape). Rings are shared by all layers in turn.
    """

    def __init__(self, device: torch.device, batch: int) -> None:
        self.device, self.batch = device, batch
        self._layers: dict[int, dict[str, torch.Tensor]] = {}
        self._rings: dict[str, list[torch.Tensor]] = {}
        self.allocated_bytes: Counter[Tier] = Counter()

    def allocate(self, layer: int, buffers: Sequence[Buffer]) -> None:
        """Allocate a layer's buffers; a ring that is too small for this layer grows.

        Raises ValueError for a dtype that the runtime cannot store, RuntimeError when a tensor's bytes are not the
        buffer's.
        """
        own = self._layers.setdefault(layer, {})
        for buffer in buffers:
            if buffer.view:
                continue
            if not buffer.ring:
                own[buffer.name] = self._tensor(buffer)
                continue
            ring = self._rings.setdefault(buffer.name, [])
            if ring and ring[0].shape[1:] == (buffer.rows, *buffer.row_shape):
                continue
            for old in ring:
                self.allocated_bytes[buffer.tier] -= old.nbytes
            ring[:] = [self._tensor(buffer) for _ in range(buffer.ring)]

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """A layer's tensors by buffer name, with its turn of each ring."""
        turns = {name: ring[layer % len(ring)] for name, ring in self._rings.items()}
        return {**turns, **self._layers.get(layer, {})}

    def release(self) -> None:
        """Zero host memory, so that one sequence's cache is never readable by the next, and drop everything."""
        for tensor in (t for layer in self._layers.values() for t in layer.values()):
            if tensor.device.type == "cpu":
                tensor.zero_()
        self._layers.clear()
        self._rings.clear()
        self.allocated_bytes.clear()

    def reorder(self, rows: torch.Tensor) -> None:
        """Give each sequence of the batch the state of another (beam search): sequence i takes that of `rows[i]`."""
        for tensor in (t for layer in self._layers.values() for t in layer.values()):
            tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))

    def _tensor(self, buffer: Buffer) -> torch.Tensor:
        if buffer.dtype not in DTYPES:
            raise ValueError(
                f"buffer {buffer.name!r}: the runtime cannot store {buffer.dtype}; it stores {', '.join(DTYPES)}"
            )
        on_host = buffer.tier is not Tier.HBM
        tensor = torch.zeros(
            (self.batch, buffer.rows, *buffer.row_shape),
            dtype=DTYPES[buffer.dtype],
            device="cpu" if on_host else self.device,
            pin_memory=on_host and self.device.type == "cuda",
        )
        if tensor.nbytes != self.batch * buffer.nbytes:
            raise RuntimeError(
                f"{buffer.name}: {tensor.nbytes} bytes allocated, {self.batch} x {buffer.nbytes} planned"
            )
        self.allocated_bytes[buffer.tier] += tensor.nbytes
        return tensor
