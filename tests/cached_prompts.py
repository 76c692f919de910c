"""One replica's prefix cache by itself, as the inner loop uses it, for the prompts of a trace."""

import numpy as np
from simulated import HOST, trace

from kvsim.engine.testing import CACHE, NOBODY, TIER, Chains, cache_arrays, eviction, links_of, prefix_cache
from kvsim.engine.testing import window as prefix_window
from policies import Reuse


class Cache:
    """Tiers of so many blocks, each token of one byte; prompts are given by their number in the trace."""

    def __init__(
        self,
        requests,
        *,
        hbm=0,
        ddr=0,
        nvme=0,
        remote=0,
        eviction="lru",
        write="through",
        reuse=Reuse.BLOCKS,
        host=HOST,
    ):
        chains, block = Chains(requests, reuse), requests.block_tokens
        self.ids, self.requests = np.unique(requests.block_ids), requests
        sizes = np.array([hbm, ddr, nvme, remote]) * block
        tiers = np.zeros(np.count_nonzero(sizes), dtype=TIER)
        tiers["capacity_bytes"], tiers["memory"] = sizes[sizes > 0], np.flatnonzero(sizes)
        caches = np.full((1, 1), NOBODY, dtype=CACHE)
        caches["tiers"][0, 0, sizes > 0] = np.arange(len(tiers))
        self.arrays = cache_arrays(
            chains,
            np.zeros(len(requests), np.int64),
            tiers,
            caches,
            links_of(host, 1),
            order=eviction,
            back=write == "back",
            replicas_per_host=1,
            block_tokens=block,
            block_bytes=block,
        )

    def tier(self, place):
        """The record of a tier that is on."""
        return self.arrays.tiers[self.arrays.caches["tiers"][0, 0, place]]

    def held(self, place):
        """The ids of the blocks in a tier."""
        if self.arrays.caches["tiers"][0, 0, place] == NOBODY:
            return set()
        table, keys = self.arrays.table, self.arrays.shelf["keys"]
        memories, found = np.divmod(table[table[:, 0] > 0, 0] - 1, keys)
        return set(self.ids[found[memories == self.tier(place)["memory"]]].tolist())

    def put(self, place, index):
        """Keep a prompt's state in one tier; how many blocks were added, and the ids of those evicted, in order."""
        chain, shelf = self.arrays.chains[index], self.arrays.shelf
        nbytes = int(chain["blocks_per_key"] * shelf["block_bytes"])
        added, evicted = prefix_cache.put_chain(
            self.arrays, self.tier(place), self.arrays.keys, chain["first"], int(chain["length"]), nbytes
        )
        return int(added), self.ids[self.arrays.evicted[:evicted, 0]].tolist()

    def match(self, index):
        """The cached head of a prompt."""
        hit = self.arrays.hits[index]
        prefix_cache.match(self.arrays, 0, index, int(self.requests.prompt_tokens[index]), hit)
        return hit

    def blocks(self, index):
        """The blocks of a prompt's cached head by tier."""
        return tuple(self.match(index)["blocks"].tolist())

    def accept(self, index, hit):
        eviction.learn(self.arrays, self.arrays.chains[index])
        prefix_cache.accept(self.arrays, 0, index, hit, 0.0)

    def store(self, index):
        """Keep a prompt's state; the bytes that go down over PCIe."""
        return prefix_cache.store(self.arrays, 0, index, 0.0)

    def wait(self, index):
        prefix_window.wait(self.arrays, 0, index)

    def leave(self, index):
        prefix_window.leave(self.arrays, 0, index)

    def serve(self, index):
        """Look a prompt up, use what is there, and keep its state; the blocks hit by tier."""
        hit = self.match(index)
        found = hit["blocks"].tolist()
        self.accept(index, hit)
        self.store(index)
        return found


def prompts(chains, block_tokens=16, **columns):
    """Requests one after the other whose prompts are whole blocks with these ids."""
    lengths, counts = [block_tokens * len(chain) for chain in chains], [len(chain) for chain in chains]
    ids = [key for chain in chains for key in chain]
    options = {"block_tokens": block_tokens, "block_ids": ids, "block_counts": counts} | columns
    return trace(np.arange(len(chains)), lengths, 1, **options)


def paths_of(paths):
    """Chains of ids that name paths through a tree: a block's id names its whole path, as in any trace."""
    ids = {}
    return [[ids.setdefault(tuple(path[: i + 1]), len(ids)) for i in range(len(path))] for path in paths]
