"""How attention kernels fill the SMs: thread blocks, waves, and the time that the last, half-empty wave costs.

An SM works on one block at a time, and all of them together reach the machine's rate. A block's work is counted in
tiles of keys. Three ways to cut the same work into blocks:

`flash-attention-2` (arXiv:2307.08691): one for each sequence, query head and tile of queries;
`flash-decoding` (the same library's split-KV form): in decode the query heads of a group share a block, and where that
leaves SMs idle the keys are cut into equal splits, as few as come within 15 % of the best filling; a second kernel adds
the splits up;
`lean` (LeanAttention, arXiv:2405.10480, stream-K): one for each SM, with an even share of all tiles, whatever head or
sequence they are of; a head that blocks share is added up within the kernel.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvsim.hardware.machine import Machine
from policies.dtypes import row_bytes
from policies.model import LayerShape
from policies.shown import shown

QUERY_TILE = {"prefill": 128, "decode": 64}
MOST_SPLITS = 128
NEAR_BEST = 0.85
FILLED = 0.8  # of the SMs: then splitting is not tried
PARTIAL_BYTES = 4  # of an element of a partial output, and of its log-sum-exp


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's attention over a batch: `query_tokens` new tokens of each sequence over all of its `key_tokens`."""

    layer: LayerShape
    query_tokens: int
    key_tokens: tuple[int, ...]  # of each sequence, its new ones among them
    kv_dtype: str

    def __post_init__(self) -> None:
        if self.layer.kind != "full":
            raise ValueError(
                f"thread blocks are counted for layers of full attention, not of kind {shown(self.layer.kind)}"
            )
        if not self.key_tokens or not 1 <= self.query_tokens <= min(self.key_tokens):
            raise ValueError(
                f"query_tokens={self.query_tokens} must be from 1 to the shortest sequence's "
                f"{min(self.key_tokens, default=0)} tokens"
            )

    @property
    def phase(self) -> str:
        """`prefill` where queries fill a tile by themselves, or `decode`."""
        return "decode" if self.layer.group * self.query_tokens <= QUERY_TILE["decode"] else "prefill"

    @property
    def key_tile(self) -> int:
        """Keys that a block reads at a time: what the kernels take for the head's dimension."""
        dim = self.layer.head_dim
        if self.phase == "decode":
            return 256 if dim <= 64 else 128 if dim <= 128 else 64
        return 128 if dim <= 64 else 64

    def tile_s(self, machine: Machine) -> float:
        """Seconds of one SM for a tile, at its share of the machine: arithmetic, in decode keys and values read."""
        layer, rates, sms = self.layer, machine.gpu.rates, machine.gpu.sms
        if self.phase == "prefill":
            flops = 2 * QUERY_TILE["prefill"] * self.key_tile * (layer.head_dim + layer.v_head_dim)
            return flops * sms / rates.attention_flops
        token_bytes = row_bytes((layer.head_dim,), self.kv_dtype) + row_bytes((layer.v_head_dim,), self.kv_dtype)
        return self.key_tile * token_bytes * sms / rates.hbm_Bps

    def blocks(self, *, grouped: bool) -> list[tuple[int, int]]:
        """(how many blocks, tiles of each) without splits, the longest of a sequence first.

        A tile of queries sees the keys up to its last one. `grouped`: the heads of a group share a block in decode.
        """
        layer, n = self.layer, self.query_tokens
        heads, rows = layer.heads, QUERY_TILE[self.phase]
        if grouped and self.phase == "decode":
            heads = layer.kv_heads
        found = []
        for keys in self.key_tokens:
            for first in range((n - 1) // rows * rows, -1, -rows):
                seen = keys - n + min(n, first + rows)
                found.append((heads, -(-seen // self.key_tile)))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a kernel's blocks do on the SMs, in tiles; `busiest_tiles` is what the SM that ends last has done."""

    kernel: str
    blocks: int
    sms: int
    tiles: int
    busiest_tiles: int
    splits: int
    seconds: float

    @property
    def waves(self) -> int:
        """Rounds in which the SMs take blocks."""
        return -(-self.blocks // self.sms)

    @property
    def efficiency(self) -> float:
        """Tiles done, of those that all SMs could have done until the last one ended."""
        return self.tiles / (self.sms * self.busiest_tiles)


def flash_attention(attention: Attention, machine: Machine) -> Launch:
    """Blocks are taken in order by whichever SM is free first."""
    blocks = attention.blocks(grouped=False)
    busiest = busiest_tiles(blocks, machine.gpu.sms)
    seconds = machine.gpu.rates.launch_s + busiest * attention.tile_s(machine)
    return _launch("flash-attention-2", blocks, machine, busiest, 1, seconds)


def flash_decoding(attention: Attention, machine: Machine) -> Launch:
    """Each block's tiles in equal splits, and where there are several a reduction over them."""
    whole, rates = attention.blocks(grouped=True), machine.gpu.rates
    count, longest = sum(n for n, _ in whole), max(tiles for _, tiles in whole)
    splits = best_splits(count, machine.gpu.sms, longest)
    blocks = []
    for n, tiles in whole:
        size = -(-tiles // splits)
        full, rest = divmod(tiles, size)
        blocks += [(n * full, size)] + ([(n, rest)] if rest else [])
    busiest = busiest_tiles(blocks, machine.gpu.sms)
    seconds = rates.launch_s + busiest * attention.tile_s(machine)
    if splits > 1:
        seconds += rates.launch_s + 2 * _partial_bytes(attention) * splits / rates.hbm_Bps
    return _launch("flash-decoding", blocks, machine, busiest, splits, seconds)


def lean_attention(attention: Attention, machine: Machine) -> Launch:
    """All tiles in one row, cut evenly; blocks that do not hold a whole head write their part, and one reads it."""
    whole, sms, rates = attention.blocks(grouped=True), machine.gpu.sms, machine.gpu.rates
    tiles = sum(n * each for n, each in whole)
    busiest, used = -(-tiles // sms), min(sms, tiles)
    heads = sum(n for n, _ in whole)
    shared = 2 * _partial_bytes(attention) * used / heads / rates.hbm_Bps  # each block ends within a head, at the most
    seconds = rates.launch_s + busiest * attention.tile_s(machine) + shared
    return Launch(kernel="lean", blocks=used, sms=sms, tiles=tiles, busiest_tiles=busiest, splits=1, seconds=seconds)


KERNELS: dict[str, Callable[[Attention, Machine], Launch]] = {
    "flash-attention-2": flash_attention,
    "flash-decoding": flash_decoding,
    "lean": lean_attention,
}


def best_splits(blocks: int, sms: int, tiles: int) -> int:
    """Into how many splits the kernel cuts `tiles` of keys where there are so many blocks without.

    Several only where the blocks fill less than 80 % of the SMs; then the fewest that fill their waves to within 15 %
    of the best. Splits that are no smaller than those of one split less do not count.
    """
    if blocks >= FILLED * sms:
        return 1
    filling = {
        splits: blocks * splits / sms / -(-blocks * splits // sms)
        for splits in range(1, min(MOST_SPLITS, sms, tiles) + 1)
        if splits == 1 or -(-tiles // splits) != -(-tiles // (splits - 1))
    }
    best = max(filling.values())
    return next(splits for splits, filled in filling.items() if filled >= NEAR_BEST * best)


def busiest_tiles(blocks: Sequence[tuple[int, int]], sms: int) -> int:
    """The tiles that the SM which ends last has done, when each takes the next block as soon as it is free.

    `blocks` are (how many, tiles of each) in order. Where all are equal that is the number of waves times their tiles.
    """
    if len({tiles for _, tiles in blocks}) == 1:
        return -(-sum(n for n, _ in blocks) // sms) * blocks[0][1]
    free = [0] * sms
    for n, tiles in blocks:
        for _ in range(n):
            heapq.heapreplace(free, free[0] + tiles)
    return max(free)


def _launch(
    kernel: str, blocks: Sequence[tuple[int, int]], machine: Machine, busiest: int, splits: int, seconds: float
) -> Launch:
    return Launch(
        kernel=kernel,
        blocks=sum(n for n, _ in blocks),
        sms=machine.gpu.sms,
        tiles=sum(n * tiles for n, tiles in blocks),
        busiest_tiles=busiest,
        splits=splits,
        seconds=seconds,
    )


def _partial_bytes(attention: Attention) -> int:
    """Of one partial output and its log-sum-exp, for all query rows of the batch."""
    layer = attention.layer
    rows = len(attention.key_tokens) * attention.query_tokens * layer.heads
    return rows * (layer.v_head_dim + 1) * PARTIAL_BYTES
