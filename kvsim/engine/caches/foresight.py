"""What eviction orders know beside the order of use: how often each block was asked for, and when it will be again."""

import numpy as np
from numpy.typing import NDArray

from kvsim.engine.state.cluster import NOBODY
from kvsim.iteration.arrays import Ints
from policies import Reuse
from traces import Trace

Ints32 = NDArray[np.int32]


class Chains:
    """The keys under which caches hold each prompt, head first, numbered from 0 in the order of the block ids.

    Where a policy's state spans a whole prefix that is the last block alone, and only if blocks cover the prompt.
    """

    def __init__(self, trace: Trace, reuse: Reuse) -> None:
        flat, self.offsets = trace.block_ids, trace.block_offsets
        if reuse is Reuse.NOTHING:
            flat, self.offsets = flat[:0], np.zeros_like(self.offsets)
        self.blocks = np.diff(self.offsets)  # of each prompt
        self.blocks_per_key = np.ones_like(self.blocks)
        if reuse is Reuse.PREFIX:
            whole = (self.blocks > 0) & (self.blocks * trace.block_tokens >= trace.prompt_tokens)
            flat = flat[self.offsets[1:][whole] - 1]
            self.offsets = np.concatenate([[0], np.cumsum(whole)])
            self.blocks_per_key = self.blocks
        ids, keys = np.unique(flat, return_inverse=True)
        self.flat: Ints = keys.astype(np.int64)
        self.keys = len(ids)  # how many there are

    @property
    def lengths(self) -> Ints:
        """How many keys each prompt has."""
        return np.diff(self.offsets)

    def are_prefixes(self, parts: Ints) -> bool:
        """Whether each key stands for a whole prefix: always behind the same key, and in one of the prompts' `parts`.

        So it is where ids are of prefixes; an id of a block's own text may stand behind others elsewhere.
        """
        before = np.full(len(self.flat), NOBODY, np.int32)
        before[1:] = self.flat[:-1]
        before[self.offsets[:-1][self.lengths > 0]] = NOBODY
        return all(self._agree(each) for each in (before, np.repeat(parts.astype(np.int32), self.lengths)))

    def _agree(self, values: Ints32) -> bool:
        """Whether a key has the same value wherever it stands."""
        of_key = np.zeros(self.keys, np.int32)
        of_key[self.flat] = values
        return bool((of_key[self.flat] == values).all())


def next_uses(chains: Chains) -> tuple[Ints, Ints]:
    """Where each key is used first, and for each place in the sequence of all keys where its key is used next.

    Prompts come in order of arrival. A key that is used no more comes after every place, and the later, the further
    down its chain.
    """
    flat, offsets = chains.flat, chains.offsets
    order = np.argsort(flat, kind="stable")
    again = flat[order[1:]] == flat[order[:-1]]
    depth = np.arange(len(flat)) - np.repeat(offsets[:-1], chains.lengths)
    after: Ints = len(flat) + depth
    after[order[:-1][again]] = order[1:][again]
    first = np.ones(len(flat), np.bool_)
    first[1:] = ~again
    return order[first], after
