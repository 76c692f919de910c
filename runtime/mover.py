"""The only file that copies between tiers; it counts the bytes where it copies."""

from collections import Counter
from collections.abc import Iterable

import torch

from policies.plan import Tier

Piece = tuple[torch.Tensor, torch.Tensor]  # destination, source


class Mover:
    """Copies between tiers and the bytes that it has moved per (source, destination)."""

    def __init__(self) -> None:
        self.moved_bytes: Counter[tuple[Tier, Tier]] = Counter()

    def copy(self, pieces: Iterable[Piece], src: Tier, dst: Tier) -> int:
        """Copy each source into its destination, asynchronously beside a GPU; the bytes moved.

        Raises ValueError where shapes differ: nothing is broadcast.
        """
        moved = 0
        for destination, source in pieces:
            if destination.shape != source.shape:
                raise ValueError(f"a copy of shape {tuple(source.shape)} does not fit {tuple(destination.shape)}")
            destination.copy_(source, non_blocking=True)
            moved += source.nbytes
        self.moved_bytes[src, dst] += moved
        return moved
