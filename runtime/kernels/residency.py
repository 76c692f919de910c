"""Which blocks a cache on the device has, and which slots those take that it lacks: least recently used goes first."""

import torch
from torch import Tensor

from runtime.kernels.select import NONE


def take_slots(resident: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Make the slots hold the blocks `wanted`: `(missed, slots)`, and `resident` is updated.

    resident `(batch, kv_heads, slots, 2)`, int32: the block in each slot, and when it was last wanted, 0 for a slot
    that is empty; a head's clock is its latest time and one. wanted `(batch, kv_heads, n)`: blocks that differ, -1 for
    none; n is at most the slots. missed is bool, whether a block was in no slot; slots, int64, has the slot of each
    block, -1 for none. A block that was missed takes an empty slot or that of the block wanted longest ago, of several
    the lowest; no block that is wanted loses its own. Nothing waits for the device.
    Raises ValueError for shapes that do not fit together.
    """
    if resident.dim() != 4 or wanted.dim() != 3 or resident.shape[:2] != wanted.shape[:2]:
        raise ValueError(
            f"resident {tuple(resident.shape)} must be (batch, kv_heads, slots, 2) and wanted {tuple(wanted.shape)} "
            "(batch, kv_heads, n)"
        )
    if wanted.shape[2] > resident.shape[2]:
        raise ValueError(f"{wanted.shape[2]} blocks do not fit in {resident.shape[2]} slots")
    held, stamps = resident.unbind(3)
    now = (stamps.amax(dim=-1, keepdim=True) + 1).expand(wanted.shape)
    blocks, there = wanted.int(), wanted >= 0
    ordered, by_block = torch.where(stamps > 0, held, NONE).sort(dim=-1, stable=True)
    place = torch.searchsorted(ordered, blocks.contiguous()).clamp(max=ordered.shape[-1] - 1)
    hit = there & (ordered.gather(-1, place) == blocks)
    own = by_block.gather(-1, place)
    spare = resident.shape[2]  # a column too many, where what is not meant lands
    stamps = _with_spare(stamps).scatter(-1, torch.where(hit, own, spare), now)[..., :-1]
    oldest = stamps.argsort(dim=-1, stable=True)
    missed = there & ~hit
    taken = oldest.gather(-1, (missed.cumsum(dim=-1) - 1).clamp(min=0))
    target = torch.where(missed, taken, spare)
    resident[..., 0] = _with_spare(held).scatter(-1, target, blocks)[..., :-1]
    resident[..., 1] = _with_spare(stamps).scatter(-1, target, now)[..., :-1]
    return missed, torch.where(missed, taken, torch.where(hit, own, NONE))


def _with_spare(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, 1))
