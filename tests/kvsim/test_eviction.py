"""Which entry goes first: each order against what it promises, all of them against Belady's bound."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import trace

import traces
from kvsim.eviction import EVICTIONS, Belady, Fifo, Lfu, Lru, SchedulerAware
from kvsim.foresight import Chains, NextUse, Uses
from kvsim.prefix_cache import PrefixCache, Tier
from policies import Reuse
from traces.stats import infinite_cache_hit_ratio

BLOCK = 16

PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=30)


def prompts(paths):
    """Requests whose blocks are these paths through a tree: a block's id names its whole path, as in any trace."""
    ids = {}
    blocks = [[ids.setdefault(tuple(path[: i + 1]), len(ids)) for i in range(len(path))] for path in paths]
    lengths = [BLOCK * len(chain) for chain in blocks]
    flat, counts = [key for chain in blocks for key in chain], [len(chain) for chain in blocks]
    return trace(np.arange(len(paths)), lengths, 1, block_tokens=BLOCK, block_ids=flat, block_counts=counts)


class Served:
    """One tier under one order, and the requests of a trace served one after the other."""

    def __init__(self, requests, eviction, room):
        self.requests, chains = requests, Chains(requests, Reuse.BLOCKS)
        self.knowledge = {"lfu": Uses, "belady": NextUse}.get(eviction, lambda _: None)(chains)
        orders = {
            "lru": Lru,
            "lfu": lambda: Lfu(self.knowledge),
            "fifo": Fifo,
            "belady": lambda: Belady(self.knowledge),
            "scheduler-aware": lambda: SchedulerAware(room),
        }
        self.tier = Tier(room * BLOCK, orders[eviction]())
        self.cache = PrefixCache(Reuse.BLOCKS, BLOCK, 1, 1, [self.tier, Tier(0), Tier(0), Tier(0)])

    def serve(self, index):
        blocks, prompt = self.requests.blocks(index).tolist(), int(self.requests.prompt_tokens[index])
        self.cache.leave(index)
        hit = self.cache.match(blocks, prompt)
        if self.knowledge is not None:
            self.knowledge.served(index)
        self.cache.accept(blocks, hit)
        self.cache.store(blocks, prompt)
        return hit.blocks[0]

    def all(self):
        """The blocks hit by all requests."""
        return sum(self.serve(index) for index in range(len(self.requests)))


def queued(requests, room, ahead):
    """Hit blocks of the scheduler-aware order, which sees so many requests ahead."""
    served = Served(requests, "scheduler-aware", room)
    hits = 0
    for index in range(len(requests) + ahead):
        if index < len(requests):
            served.cache.wait(index, requests.blocks(index).tolist(), int(requests.prompt_tokens[index]))
        if index >= ahead:
            hits += served.serve(index - ahead)
    return hits


def test_orders_on_a_sequence_counted_by_hand():
    """Two blocks of room and single blocks a b a c a b: who is there at each turn says the hits.

    LRU: a, c replaces b, a hits, b replaces c. FIFO: c replaces a. Belady lets c pass by, so that b hits as well.
    """
    requests = prompts([[0], [1], [0], [2], [0], [1]])
    found = {name: Served(requests, name, 2).all() for name in EVICTIONS}
    assert found == {"lru": 2, "lfu": 2, "fifo": 1, "belady": 3, "scheduler-aware": 2}
    assert queued(requests, 2, 3) == 3  # it sees that b will be needed, and has never heard that c will


def test_lfu_counts_requests_through_evictions():
    """One block of room: b and c alternate with a, whose count of three outlives nothing that came once."""
    requests = prompts([[0], [0], [0], [1], [2], [0]])
    served = Served(requests, "lfu", 1)
    assert [served.serve(i) for i in range(6)] == [0, 1, 1, 0, 0, 0]
    assert served.knowledge == Counter({0: 4, 1: 1, 2: 1})
    two = Served(requests, "lfu", 2)
    assert [two.serve(i) for i in range(6)] == [0, 1, 1, 0, 0, 1]  # c replaces b, not a


@given(paths=PATHS, room=st.integers(0, 12), eviction=st.sampled_from(EVICTIONS))
def test_no_block_outlives_what_it_continues(paths, room, eviction):
    """A cached block's whole head is cached: chains go from their tail. And the books of the tier add up."""
    requests = prompts(paths)
    served = Served(requests, eviction, room)
    for index in range(len(requests)):
        served.serve(index)
        kept = served.tier.entries
        for other in range(index + 1):
            chain = requests.blocks(other).tolist()
            held = [key in kept for key in chain]
            assert held == sorted(held, reverse=True)
        assert served.tier.used_bytes == BLOCK * len(kept) <= room * BLOCK


@given(paths=PATHS, room=st.integers(1, 8), ahead=st.integers(0, 5))
def test_nothing_hits_more_than_beladys_bound(paths, room, ahead):
    requests = prompts(paths)
    bound = Served(requests, "belady", room).all()
    for eviction in EVICTIONS:
        assert Served(requests, eviction, room).all() <= bound
    assert queued(requests, room, ahead) <= bound


@given(sequence=st.lists(st.integers(0, 4), min_size=1, max_size=8), room=st.integers(1, 3))
def test_belady_hits_as_many_as_the_best_of_all_choices(sequence, room):
    """Against all states that any policy could be in: after each block, any set of at most `room` known ones."""
    best = {frozenset(): 0}
    for block in sequence:
        states = {}
        for kept, hits in best.items():
            now = hits + (block in kept)
            pool = kept | {block}
            choices = {pool - {out} for out in pool} if len(pool) > room else {pool}
            for choice in choices:
                states[choice] = max(states.get(choice, 0), now)
        best = states
    assert Served(prompts([[block] for block in sequence]), "belady", room).all() == max(best.values())


@given(paths=PATHS, room=st.integers(0, 10), eviction=st.sampled_from(["lru", "belady"]))
def test_a_larger_tier_holds_all_that_a_smaller_one_does(paths, room, eviction):
    requests = prompts(paths)
    small, large = Served(requests, eviction, room), Served(requests, eviction, room + 1)
    for index in range(len(requests)):
        assert small.serve(index) <= large.serve(index)
        assert small.tier.entries.keys() <= large.tier.entries.keys()


@pytest.mark.parametrize(
    ("name", "tokens", "share"),
    [
        ("mooncake-conversation", 3_000_000, 0.37),
        ("mooncake-synthetic", 3_000_000, 0.48),
        ("mooncake-conversation", 50_000_000, 0.992),
    ],
)
def test_mooncakes_hit_ratios_by_capacity(name, tokens, share):
    """Shares of the maximum: 37 % and 48 % of an LRU of 3 M tokens; 50 M tokens come near all of it (FAST'25)."""
    requests = traces.load(name)
    chains = Chains(requests, Reuse.BLOCKS)
    tier = Tier(tokens // requests.block_tokens * BLOCK)
    cache = PrefixCache(Reuse.BLOCKS, BLOCK, 1, 1, [tier, Tier(0), Tier(0), Tier(0)])
    for index in range(len(requests)):
        blocks = chains.of(index)
        prompt = BLOCK * len(blocks)
        cache.accept(blocks, cache.match(blocks, prompt))
        cache.store(blocks, prompt)
    found = tier.hit_blocks / tier.lookup_blocks / infinite_cache_hit_ratio(requests)
    assert found == pytest.approx(share, abs=0.005)
