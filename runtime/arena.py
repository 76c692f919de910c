"""Allocates what a policy's plan stores, and nothing else."""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from policies.plan import Buffer, Tier
from runtime.footprint import Footprint

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

    A tensor has shape (batch, rows, *row_shape). Rings are shared by all layers in turn; layers may see one in other
    shapes. What only a prompt needs is allocated apart, so that it can be freed when the prompt is complete.
    """

    def __init__(self, device: torch.device, batch: int, footprint: Footprint | None = None) -> None:
        """`footprint` is told of all that is allocated and freed, also when the arena is forgotten unreleased."""
        self.device, self.batch, self.footprint = device, batch, footprint or Footprint()
        self.allocated_bytes: Counter[Tier] = Counter()
        weakref.finalize(self, self.footprint.drop, self.allocated_bytes).atexit = False
        self.revision = 0  # grows whenever a tensor comes or goes, so that whoever keeps tensors knows
        self._own: dict[int, dict[str, _Held]] = {}
        self._rings: dict[tuple[Tier, str], list[_Held]] = {}
        self._passing: list[tuple[int, str]] = []  # (layer, name) of what only the prompt needs
        self._passing_rings: set[tuple[Tier, str]] = set()

    def allocate(self, layer: int, buffers: Iterable[Buffer], *, passing: bool = False) -> None:
        """Allocate a layer's buffers; `passing`: until `release_passing`. A ring that is too small grows.

        Raises ValueError for a dtype that the runtime cannot store, RuntimeError when a tensor's bytes are not the
        buffer's.
        """
        for buffer in buffers:
            if buffer.view:
                continue
            if buffer.ring:
                self._grow(buffer, passing)
                continue
            held = self._own.setdefault(layer, {})
            if buffer.name not in held:
                held[buffer.name] = self._hold(buffer)
                if passing:
                    self._passing.append((layer, buffer.name))

    def tensors(self, layer: int, buffers: Iterable[Buffer]) -> dict[str, torch.Tensor]:
        """A layer's tensors by buffer name; of each ring its turn, in the shape that this step's `buffers` say."""
        tensors = self.kept(layer)
        for buffer in buffers:
            if buffer.ring and not buffer.view:
                tensors[buffer.name] = self.ring(layer, buffer)
        return tensors

    def ring(self, layer: int, buffer: Buffer) -> torch.Tensor:
        """A layer's turn of a ring, in the shape that `buffer` says."""
        ring = self._rings[buffer.tier, buffer.name]
        return self._shaped(ring[layer % len(ring)].tensor, buffer)

    def kept(self, layer: int) -> dict[str, torch.Tensor]:
        """What a layer keeps from step to step."""
        return {name: held.tensor for name, held in self._own.get(layer, {}).items()}

    def held(self) -> list[tuple[Tier, torch.Tensor]]:
        """Every tensor and the tier that it lies in."""
        return [(held.tier, held.tensor) for held in self._all()]

    def release_passing(self) -> None:
        """Free what only the prompt needed."""
        for layer, name in self._passing:
            self._free(self._own[layer].pop(name))
        for key in self._passing_rings:
            for held in self._rings.pop(key):
                self._free(held)
        self._passing.clear()
        self._passing_rings.clear()

    def release(self) -> None:
        """Zero host memory, so that one sequence's cache is never readable by the next, and drop everything."""
        self.footprint.drop(self.allocated_bytes.copy())
        self.allocated_bytes.clear()
        self.revision += 1
        for held in self._all():
            self._erase(held)
        for table in (self._own, self._rings, self._passing, self._passing_rings):
            table.clear()

    def reorder(self, rows: torch.Tensor) -> None:
        """Give each sequence of the batch the state of another (beam search): sequence i takes that of `rows[i]`."""
        for held in (h for layer in self._own.values() for h in layer.values()):
            held.tensor.copy_(held.tensor.index_select(0, rows.to(held.tensor.device)))

    def taken(self, rows: torch.Tensor) -> "Arena":
        """A new arena of `len(rows)` sequences, of which sequence i has the state that `rows[i]` has here."""
        taken = Arena(self.device, len(rows), self.footprint)
        for layer, named in self._own.items():
            taken._own[layer] = {name: taken._copied(held, rows) for name, held in named.items()}
        for key, ring in self._rings.items():  # nothing in them outlives a layer's turn
            taken._rings[key] = [taken._like(held) for held in ring]
        taken._passing, taken._passing_rings = list(self._passing), set(self._passing_rings)
        return taken

    def _copied(self, held: "_Held", rows: torch.Tensor) -> "_Held":
        made = self._like(held)
        torch.index_select(held.tensor, 0, rows.to(held.tensor.device), out=made.tensor)
        return made

    def _like(self, held: "_Held") -> "_Held":
        return self._new(held.tier, held.tensor.shape[1:], held.tensor.dtype)

    def _all(self) -> list["_Held"]:
        rings = [held for ring in self._rings.values() for held in ring]
        return rings + [held for layer in self._own.values() for held in layer.values()]

    def _grow(self, buffer: Buffer, passing: bool) -> None:
        key = (buffer.tier, buffer.name)
        ring = self._rings.setdefault(key, [])
        if ring and ring[0].tensor.nbytes >= self.batch * buffer.nbytes:
            return
        if passing and not ring:
            self._passing_rings.add(key)
        for held in ring:
            self._free(held)
        ring[:] = [self._hold(buffer) for _ in range(buffer.ring)]

    def _hold(self, buffer: Buffer) -> "_Held":
        if buffer.dtype not in DTYPES:
            raise ValueError(
                f"buffer {buffer.name!r}: the runtime cannot store {buffer.dtype}; it stores {', '.join(DTYPES)}"
            )
        held = self._new(buffer.tier, (buffer.rows, *buffer.row_shape), DTYPES[buffer.dtype])
        if held.tensor.nbytes != self.batch * buffer.nbytes:
            raise RuntimeError(
                f"{buffer.name}: {held.tensor.nbytes} bytes allocated, {self.batch} x {buffer.nbytes} planned"
            )
        return held

    def _new(self, tier: Tier, shape: Sequence[int], dtype: torch.dtype) -> "_Held":
        on_host = tier is not Tier.HBM
        tensor = torch.zeros(
            (self.batch, *shape),
            dtype=dtype,
            device="cpu" if on_host else self.device,
            pin_memory=on_host and self.device.type == "cuda",
        )
        self.revision += 1
        self.allocated_bytes[tier] += tensor.nbytes
        self.footprint.add(tier, tensor.nbytes)
        return _Held(tensor, tier)

    def _free(self, held: "_Held") -> None:
        self.revision += 1
        self.allocated_bytes[held.tier] -= held.tensor.nbytes
        self.footprint.drop({held.tier: held.tensor.nbytes})
        self._erase(held)

    def _erase(self, held: "_Held") -> None:
        if held.tensor.device.type == "cpu":
            held.tensor.zero_()

    def _shaped(self, storage: torch.Tensor, buffer: Buffer) -> torch.Tensor:
        dtype, shape = DTYPES[buffer.dtype], (self.batch, buffer.rows, *buffer.row_shape)
        if storage.dtype == dtype and storage.shape == shape:
            return storage
        return storage.view(-1).view(torch.uint8)[: self.batch * buffer.nbytes].view(dtype).view(shape)


class _Held(NamedTuple):
    tensor: torch.Tensor
    tier: Tier
