"""Which entry goes first: each order against what it promises, all of them against Belady's bound."""

import pytest
from cached_prompts import Cache, paths_of
from cached_prompts import prompts as prompts_of
from hypothesis import given
from hypothesis import strategies as st

import traces
from kvsim.engine.testing import HBM, prefix_cache
from kvsim.scenario.choices import EVICTIONS
from traces.stats import infinite_cache_hit_ratio

BLOCK = 16

PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=30)


def prompts(paths):
    return prompts_of(paths_of(paths), BLOCK)


class Served(Cache):
    """One tier under one order, and the requests of a trace served one after the other."""

    def __init__(self, requests, eviction, room):
        super().__init__(requests, hbm=room, eviction=eviction)

    def serve(self, index):
        self.leave(index)
        return super().serve(index)[HBM]

    def all(self):
        """The blocks hit by all requests."""
        return sum(self.serve(index) for index in range(len(self.requests)))


def queued(requests, room, ahead):
    """Hit blocks of the scheduler-aware order, which sees so many requests ahead."""
    served = Served(requests, "scheduler-aware", room)
    hits = 0
    for index in range(len(requests) + ahead):
        if index < len(requests):
            served.wait(index)
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
    assert served.arrays.known.tolist() == [4, 1, 1]
    two = Served(requests, "lfu", 2)
    assert [two.serve(i) for i in range(6)] == [0, 1, 1, 0, 0, 1]  # c replaces b, not a


@given(paths=PATHS, room=st.integers(0, 12), eviction=st.sampled_from(EVICTIONS))
def test_no_block_outlives_what_it_continues(paths, room, eviction):
    """A cached block's whole head is cached: chains go from their tail. And the books of the tier add up."""
    requests = prompts(paths)
    served = Served(requests, eviction, room)
    for index in range(len(requests)):
        served.serve(index)
        kept = served.held(HBM)
        for other in range(index + 1):
            chain = requests.blocks(other).tolist()
            held = [key in kept for key in chain]
            assert held == sorted(held, reverse=True)
        if room:
            assert served.tier(HBM)["used_bytes"] == BLOCK * len(kept) <= room * BLOCK


class ByAge:
    """One tier by the definitions alone: when each block was touched last, and the longest ago goes first."""

    def __init__(self, room, renewed_by_use):
        self.room, self.renewed_by_use, self.touched, self.now = room, renewed_by_use, {}, 0

    def touch(self, chain):
        for block in reversed(chain):
            if block in self.touched:
                self.now += 1
                self.touched[block] = self.now

    def serve(self, chain):
        """What is evicted, in order, when a prompt has used what is there and left all its blocks that fit."""
        hits = next((i for i, block in enumerate(chain) if block not in self.touched), len(chain))
        if self.renewed_by_use:
            self.touch(chain[:hits])
        chain, gone = chain[: self.room], []
        added = [block for block in chain if block not in self.touched]
        if added or self.renewed_by_use:
            self.touch(chain)
        for block in reversed(added):
            if len(self.touched) == self.room:
                gone.append(min(self.touched, key=self.touched.get))
                del self.touched[gone[-1]]
            self.touched[block] = 0
            self.touch([block])
        if added:
            self.touch(chain)
        return gone


@pytest.mark.parametrize(("eviction", "renewed_by_use"), [("lru", True), ("fifo", False)])
@given(paths=PATHS, room=st.integers(1, 12))
def test_the_oldest_go_first_and_in_that_order(eviction, renewed_by_use, paths, room):
    chains, oracle = paths_of(paths), ByAge(room, renewed_by_use)
    served = Served(prompts_of(chains, BLOCK), eviction, room)
    for index, chain in enumerate(chains):
        served.accept(index, served.match(index))
        _, evicted = served.put(HBM, index)
        assert evicted == oracle.serve(chain)
        assert served.held(HBM) == set(oracle.touched)


@given(paths=PATHS, room=st.integers(1, 12))
def test_the_heap_evicts_as_the_list_does_where_levels_are_equal(paths, room):
    """LFU that hears of no request counts none: its ranks are ages alone, which is LRU."""
    requests = prompts(paths)
    by_age, by_rank = Served(requests, "lru", room), Served(requests, "lfu", room)
    for index in range(len(requests)):
        assert by_age.match(index) == by_rank.match(index)
        for each in (by_age, by_rank):
            prefix_cache.accept(each.arrays, 0, index, each.match(index), 0.0)
        assert by_age.put(HBM, index) == by_rank.put(HBM, index)


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
        assert small.held(HBM) <= large.held(HBM)


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
    served = Served(requests, "lru", tokens // requests.block_tokens)
    found = served.all() / len(requests.block_ids) / infinite_cache_hit_ratio(requests)
    assert found == pytest.approx(share, abs=0.005)
