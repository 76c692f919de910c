"""Cached prefixes in HBM and DDR: which blocks of a prompt need no prefill, and what their state weighs."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from policies import Reuse


class LruTier:
    """Entries of known size in one memory, evicted least recently used first."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.lookup_blocks = 0
        self.hit_blocks = 0
        self._entries: OrderedDict[int, int] = OrderedDict()

    def __contains__(self, key: int) -> bool:
        return key in self._entries

    def touch(self, key: int) -> None:
        """Make an entry the most recently used."""
        self._entries.move_to_end(key)

    def put(self, key: int, nbytes: int) -> bool:
        """Add or touch an entry; False when it was there already or is larger than the tier."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return False
        if nbytes > self.capacity_bytes:
            return False
        while self.used_bytes + nbytes > self.capacity_bytes:
            self.used_bytes -= self._entries.popitem(last=False)[1]
        self._entries[key] = nbytes
        self.used_bytes += nbytes
        return True


@dataclass(frozen=True, slots=True)
class Hit:
    """The cached head of a prompt: its tokens, the bytes that must come up from DDR, and its blocks per tier."""

    tokens: int
    load_bytes: int
    hbm_blocks: int
    ddr_blocks: int


class PrefixCache:
    """A replica's HBM tier over the DDR tier of its host, written through.

    `token_bytes` and `token_hbm_bytes` are what the policy keeps per prompt token, in all and in HBM. A policy whose
    state spans a whole prefix is reused only for the very same prompt. Entries are touched from the end of a prompt to
    its start, so that a chain of blocks is evicted from its tail.
    """

    def __init__(
        self,
        reuse: Reuse,
        block_tokens: int,
        token_bytes: int,
        token_hbm_bytes: int,
        hbm: LruTier,
        ddr: LruTier,
        ranks: int = 1,
        replicas: int = 1,
    ) -> None:
        self.reuse, self.block_tokens = reuse, block_tokens
        self.block_bytes, self.block_hbm_bytes = block_tokens * token_bytes, block_tokens * token_hbm_bytes
        self.hbm, self.ddr = hbm, ddr
        self._ranks, self._replicas = ranks, replicas

    @property
    def held_bytes(self) -> list[int]:
        """Bytes per tier that the entries take, as one rank's share; the DDR tier is divided among its replicas."""
        hbm, ddr = self.hbm.used_bytes // self._ranks, self.ddr.used_bytes // (self._ranks * self._replicas)
        return [hbm, ddr, 0]

    def match(self, blocks: Sequence[int], prompt_tokens: int) -> Hit:
        """The longest cached head of a prompt, at most all of it but one token; changes nothing."""
        keys, _ = self._entries(blocks)
        in_hbm = in_ddr = 0
        for key in keys:
            if key in self.hbm:
                in_hbm += 1
            elif key in self.ddr:
                in_ddr += 1
            else:
                break
        per_key = len(blocks) // len(keys) if keys else 0
        tokens = min((in_hbm + in_ddr) * per_key * self.block_tokens, prompt_tokens - 1)
        return Hit(tokens, in_ddr * per_key * self.block_hbm_bytes, in_hbm * per_key, in_ddr * per_key)

    def accept(self, blocks: Sequence[int], hit: Hit) -> None:
        """Count the access to a prompt's blocks and make the entries of its cached head the most recent."""
        keys, _ = self._entries(blocks)
        for tier, lookups, hits in (
            (self.hbm, len(blocks), hit.hbm_blocks),
            (self.ddr, len(blocks) - hit.hbm_blocks, hit.ddr_blocks),
        ):
            if tier.capacity_bytes:
                tier.lookup_blocks += lookups
                tier.hit_blocks += hits
        head = keys if hit.hbm_blocks + hit.ddr_blocks >= len(blocks) else keys[: hit.hbm_blocks + hit.ddr_blocks]
        for key in reversed(head):
            for tier in (self.hbm, self.ddr):
                if key in tier:
                    tier.touch(key)

    def store(self, blocks: Sequence[int]) -> int:
        """Keep a finished prompt's state in both tiers; the bytes that go down to DDR."""
        keys, entry_bytes = self._entries(blocks)
        written = 0
        for key in reversed(keys):
            self.hbm.put(key, entry_bytes)
            if self.ddr.put(key, entry_bytes):
                written += self.block_hbm_bytes * (len(blocks) // len(keys))
        return written

    def _entries(self, blocks: Sequence[int]) -> tuple[Sequence[int], int]:
        if self.reuse is Reuse.NOTHING or not len(blocks):
            return (), 0
        if self.reuse is Reuse.BLOCKS:
            return blocks, self.block_bytes
        return blocks[-1:], len(blocks) * self.block_bytes
