"""The only file that copies between tiers; it counts the bytes where it copies."""

import threading
from collections import Counter
from collections.abc import Iterable

import torch

from policies.plan import Tier
from runtime.call import Gather, Piece
from runtime.kernels.gather import gather_rows


class Mover:
    """Copies between tiers and the bytes that it has moved per (source, destination)."""

    def __init__(self) -> None:
        self._copied: Counter[tuple[Tier, Tier]] = Counter()
        self._gathered: dict[tuple[Tier, Tier, int], torch.Tensor] = {}  # rows, counted by the kernel on its device
        self._lock = threading.Lock()  # caches may be used by threads of their own

    @property
    def moved_bytes(self) -> Counter[tuple[Tier, Tier]]:
        """Bytes moved so far; waits for the device where a kernel counts."""
        with self._lock:
            return self._copied + self.gathered_bytes

    @property
    def gathered_bytes(self) -> Counter[tuple[Tier, Tier]]:
        """What of them gather kernels have counted where they ran."""
        gathered: Counter[tuple[Tier, Tier]] = Counter()
        for (src, dst, row_bytes), rows in self._gathered.items():
            gathered[src, dst] += int(rows) * row_bytes
        return gathered

    def move(self, pieces: Iterable[Piece | Gather], src: Tier, dst: Tier) -> int | None:
        """Copy or gather each piece, asynchronously beside a GPU; the bytes moved, None where a device counts them.

        Raises ValueError where shapes differ: nothing is broadcast.
        """
        moved: int | None = 0
        for piece in pieces:
            nbytes = self._gather(piece, src, dst) if isinstance(piece, Gather) else self._copy(piece, src, dst)
            moved = None if moved is None or nbytes is None else moved + nbytes
        return moved

    def _copy(self, piece: Piece, src: Tier, dst: Tier) -> int:
        destination, source = piece
        if destination.shape != source.shape:
            raise ValueError(f"a copy of shape {tuple(source.shape)} does not fit {tuple(destination.shape)}")
        destination.copy_(source, non_blocking=True)
        with self._lock:
            self._copied[src, dst] += source.nbytes
        return source.nbytes

    def _gather(self, piece: Gather, src: Tier, dst: Tier) -> int | None:
        row_bytes = piece.src.shape[-1] * piece.src.element_size()
        key = (src, dst, row_bytes)
        with self._lock:
            if key not in self._gathered:
                self._gathered[key] = torch.zeros(1, dtype=torch.int64, device=piece.dst.device)
            rows = self._gathered[key]
        if piece.dst.is_cuda:
            gather_rows(piece.src, piece.ids, piece.dst, piece.slots, rows)
            return None
        gathered = torch.zeros_like(rows)
        gather_rows(piece.src, piece.ids, piece.dst, piece.slots, gathered)
        with self._lock:
            rows += gathered
        return int(gathered) * row_bytes
