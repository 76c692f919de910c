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

    def put_chain(self, keys: Sequence[int], nbytes: int) -> int:
        """Add or touch entries of a size from the last to the first, without the last that do not fit; those added."""
        fitting = keys[: self.capacity_bytes // max(1, nbytes)]
        return sum(self.put(key, nbytes) for key in reversed(fitting))


@dataclass(frozen=True, slots=True)
class Hit:
    """The cached head of a prompt: its tokens, the bytes that must come up from DDR, its blocks per tier, its keys."""

    tokens: int
    load_bytes: int
    hbm_blocks: int
    ddr_blocks: int
    keys: Sequence[int]


class PrefixCache:
    """A replica's HBM tier over the DDR tier of its host, written through.

    `token_bytes` and `token_hbm_bytes` are what the policy keeps per prompt token, in all and in HBM. A policy whose
    state spans a whole prefix is reused only for the very same prompt, which takes ids that cover all of it. Entries
    are touched from the end of a prompt to its start, so that a chain of blocks is evicted from its tail.
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
        keys = self._keys(blocks, prompt_tokens)
        in_hbm = in_ddr = 0
        for key in keys:
            if key in self.hbm:
                in_hbm += 1
            elif key in self.ddr:
                in_ddr += 1
            else:
                break
        n = self._blocks_per_key(blocks)
        tokens = min((in_hbm + in_ddr) * n * self.block_tokens, prompt_tokens - 1)
        load_bytes = in_ddr * n * self.block_hbm_bytes
        return Hit(tokens, load_bytes, in_hbm * n, in_ddr * n, keys[: in_hbm + in_ddr])

    def accept(self, blocks: Sequence[int], hit: Hit) -> None:
        """Count the access to a prompt's blocks and make the entries of its cached head the most recent."""
        for tier, lookups, hits in (
            (self.hbm, len(blocks), hit.hbm_blocks),
            (self.ddr, len(blocks) - hit.hbm_blocks, hit.ddr_blocks),
        ):
            if tier.capacity_bytes:
                tier.lookup_blocks += lookups
                tier.hit_blocks += hits
            for key in reversed(hit.keys):
                if key in tier:
                    tier.touch(key)

    def store(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """Keep a finished prompt's state in both tiers, its head where not all of it fits; the bytes written to DDR."""
        keys, n = self._keys(blocks, prompt_tokens), self._blocks_per_key(blocks)
        self.hbm.put_chain(keys, n * self.block_bytes)
        return self.ddr.put_chain(keys, n * self.block_bytes) * n * self.block_hbm_bytes

    def _keys(self, blocks: Sequence[int], prompt_tokens: int) -> Sequence[int]:
        if self.reuse is Reuse.BLOCKS:
            return blocks
        whole = self.reuse is Reuse.PREFIX and len(blocks) * self.block_tokens >= prompt_tokens
        return blocks[-1:] if whole else ()

    def _blocks_per_key(self, blocks: Sequence[int]) -> int:
        return len(blocks) if self.reuse is Reuse.PREFIX else 1
