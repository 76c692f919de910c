"""What eviction orders know beside the order of use: how often each block was asked for, and when it will be again."""

import numpy as np
from numpy.typing import NDArray

from policies import Reuse
from traces import Trace


class Chains:
    """The keys under which a cache holds each prompt, head first: those that `PrefixCache.keys` gives."""

    def __init__(self, trace: Trace, reuse: Reuse) -> None:
        self.flat, self.offsets = trace.block_ids, trace.block_offsets
        if reuse is Reuse.PREFIX:
            counts = np.diff(self.offsets)
            whole = (counts > 0) & (counts * trace.block_tokens >= trace.prompt_tokens)
            self.flat = self.flat[self.offsets[1:][whole] - 1]
            self.offsets = np.concatenate([[0], np.cumsum(whole)])

    def of(self, request: int) -> list[int]:
        """One prompt's keys."""
        keys: list[int] = self.flat[self.offsets[request] : self.offsets[request + 1]].tolist()
        return keys


class Uses(dict[int, int]):
    """For each key the requests that have asked for it."""

    def __init__(self, chains: Chains) -> None:
        super().__init__()
        self._chains = chains

    def served(self, request: int) -> None:
        """A request begins."""
        for key in self._chains.of(request):
            self[key] = self.get(key, 0) + 1


class NextUse(dict[int, int]):
    """For each key where it is used next: a place in the sequence of all prompts' keys in order of arrival.

    A key that is used no more comes after every place, and the later, the further down its chain.
    """

    def __init__(self, chains: Chains) -> None:
        self._chains, flat, offsets = chains, chains.flat, chains.offsets
        order = np.argsort(flat, kind="stable")
        again = flat[order[1:]] == flat[order[:-1]]
        depth = np.arange(len(flat)) - np.repeat(offsets[:-1], np.diff(offsets))
        self._after: NDArray[np.int64] = len(flat) + depth
        self._after[order[:-1][again]] = order[1:][again]
        first = np.ones(len(flat), np.bool_)
        first[1:] = ~again
        super().__init__(zip(flat[order[first]].tolist(), order[first].tolist(), strict=True))

    def served(self, request: int) -> None:
        """A request begins. Where it has overtaken another one, the latest look ahead holds."""
        start, end = self._chains.offsets[request : request + 2].tolist()
        for key, after in zip(self._chains.of(request), self._after[start:end].tolist(), strict=True):
            self[key] = max(self[key], after)
