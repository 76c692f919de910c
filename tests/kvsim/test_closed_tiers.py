"""Where a tier has all that comes before a key it has, a head found by bisection is the one a walk would find."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from cached_prompts import Cache, paths_of, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import BLOCK, SMALL, TOKEN_BYTES, with_room
from simulated import setup, trace

from kvsim.engine.testing import NOBODY, Chains, PrefixTiers, index
from kvsim.run.simulate import simulate
from kvsim.scenario.choices import EVICTIONS, ROUTERS
from kvsim.scenario.tenants import Tenant
from policies import Reuse

CLOSED = ("lru", "fifo")
PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)
ROOMS = st.tuples(st.integers(0, 14), st.integers(0, 14)).filter(any)


def walking(requests, **options):
    """A cache that looks every key up."""
    cache = Cache(requests, **options)
    cache.arrays.shelf["closed"] = False
    return cache


@settings(max_examples=40)
@given(paths=PATHS, rooms=ROOMS, eviction=st.sampled_from(CLOSED))
def test_bisection_finds_in_hbm_and_ddr_what_a_walk_does(paths, rooms, eviction):
    """After each prompt that is served all are looked up, those that come later too."""
    requests, options = prompts(paths_of(paths)), {"hbm": rooms[0], "ddr": rooms[1], "eviction": eviction}
    quick, slow = Cache(requests, **options), walking(requests, **options)
    assert quick.arrays.shelf["closed"]
    for served in range(len(requests)):
        assert quick.serve(served) == slow.serve(served)
        for other in range(len(requests)):
            assert quick.match(other) == slow.match(other)
    for place in range(2):
        assert quick.held(place) == slow.held(place)


@st.composite
def small_clusters(draw):
    """Prompts of two tenants that are paths through a tree, on replicas whose HBM and DDR keep a few blocks."""
    paths = draw(st.lists(st.lists(st.integers(0, 1), max_size=7), min_size=1, max_size=8))
    n = len(paths)
    tenant = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    blocks = paths_of([[2 + owner, *path] for owner, path in zip(tenant, paths, strict=True)])
    gaps = draw(st.lists(st.floats(0, 0.1) | st.just(0.0), min_size=n, max_size=n))
    outputs = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    counts = [len(ids) for ids in blocks]
    tails = draw(st.lists(st.integers(0, BLOCK - 1), min_size=n, max_size=n))
    lengths = [BLOCK * count + tail for count, tail in zip(counts, tails, strict=True)]
    ids = {"block_tokens": BLOCK, "block_ids": [i for each in blocks for i in each], "block_counts": counts}
    requests = trace(np.cumsum(gaps), lengths, outputs, tenant=tenant, tenants=("a", "b"), **ids)
    policy, gpus = draw(st.sampled_from(["full", "offload-all", "shadowkv:budget_tokens=256"])), 2
    s = setup(policy, model=SMALL, gpus=gpus)
    rooms = draw(st.tuples(*[st.sampled_from([0, 16, 40])] * 2).filter(any))
    hbm, ddr = (room * BLOCK * TOKEN_BYTES for room in rooms)
    s = replace(s, prefix_cache_hbm_bytes=hbm, prefix_cache_ddr_bytes=ddr)
    s = replace(s, router=draw(st.sampled_from(ROUTERS)), prefix_cache_eviction=draw(st.sampled_from(CLOSED)))
    s = replace(s, prefix_cache_reuse=draw(st.sampled_from(["always", "cheaper"])))
    if draw(st.booleans()):
        s = replace(s, tenants={"a": Tenant(), "b": Tenant()}, prefix_cache_quota={"a": 0.5, "b": 0.5})
    return requests, with_room(s, 3000 * TOKEN_BYTES, 6000 * TOKEN_BYTES)


@settings(max_examples=20, deadline=None)
@given(scenario=small_clusters())
def test_simulations_do_not_depend_on_how_heads_are_found(scenario):
    assert PrefixTiers(*scenario).arrays.shelf["closed"]
    quick = simulate(*scenario)
    with patch.object(Chains, "are_prefixes", lambda *_: False):
        assert not PrefixTiers(*scenario).arrays.shelf["closed"]
        slow = simulate(*scenario)
    for name, column in quick.requests.items():
        np.testing.assert_array_equal(column, slow.requests[name], err_msg=name)
    assert (quick.cache, quick.traffic) == (slow.cache, slow.traffic)


@pytest.mark.parametrize(
    ("options", "closed"),
    [({"eviction": name}, name in CLOSED) for name in EVICTIONS]
    + [({"write": "back"}, False), ({"nvme": 9}, False), ({"remote": 9}, False), ({"reuse": Reuse.PREFIX}, True)],
)
def test_only_tiers_without_gaps_are_bisected(options, closed):
    cache = Cache(prompts([[0, 1, 2], [0, 1, 3], [4]]), **({"hbm": 9, "ddr": 9} | options))
    assert cache.arrays.shelf["closed"] == closed


@pytest.mark.parametrize(
    "chains",
    [
        [[7, 8, 7]],  # twice in a prompt
        [[7, 7]],
        [[7, 8], [8]],  # within one prompt, at the head of another
        [[8], [7, 8]],
        [[7, 9], [8, 9]],  # behind two others
    ],
)
def test_ids_of_a_blocks_own_text_are_walked(chains):
    assert not Cache(prompts(chains), hbm=9).arrays.shelf["closed"]


def chains_of(*ids):
    """Of prompts that end within a block which has no id."""
    counts, lengths = [len(each) for each in ids], [16 * len(each) + 5 for each in ids]
    columns = {"block_tokens": 16, "block_ids": [i for each in ids for i in each], "block_counts": counts}
    return Chains(trace(np.arange(len(ids)), lengths, 1, **columns), Reuse.BLOCKS)


def test_parts_that_share_an_id_are_walked():
    """One tenant's blocks may go while the other's stay, and a memory has an id but once."""
    parts = np.array([0, 0, 1, 1])
    assert chains_of([1, 2], [], [3], []).are_prefixes(parts)
    assert chains_of([1, 2], [1], [3], [3, 4]).are_prefixes(parts)
    assert not chains_of([1, 2], [], [1], []).are_prefixes(parts)
    assert chains_of([1, 2], [], [1], []).are_prefixes(0 * parts)
    assert not chains_of([], [7], [], [8, 7]).are_prefixes(0 * parts)


KEYS = st.integers(0, 40) | st.integers(0, 300) | st.builds(lambda row: 64 * row, st.integers(0, 1 << 40))


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
@settings(max_examples=15)
@given(keys=st.lists(KEYS, min_size=1, max_size=60, unique=True), seed=st.integers(0, 1000))
def test_the_index_of_keys_is_a_dict_when_all_rows_but_one_are_taken(bits, keys, seed):
    """Keys come and go at random until all are there, then go one by one; after each step all are looked up."""
    rng, table, kept = np.random.default_rng(seed), np.zeros((1 << bits, 2), np.int64), {}
    free = (key for key in range(1000, 2000) if key not in keys)
    keys += [next(free) for _ in range((1 << bits) - 1 - len(keys))]
    keys = keys[: (1 << bits) - 1]  # one row must stay free, where a search in vain ends
    for step in range(2 * len(keys)):
        key = keys[rng.integers(len(keys))]
        if key in kept and rng.integers(2):
            index.remove(table, key)
            del kept[key]
        else:
            index.put(table, key, step)
            kept[key] = step
    for key in keys:
        index.put(table, key, -key - 2)
        kept[key] = -key - 2
    assert np.count_nonzero(table[:, 0]) == len(keys)
    assert all(index.get(table, key) == number for key, number in kept.items())
    for i, key in enumerate(rng.permutation(keys).tolist()):
        index.remove(table, key)
        del kept[key]
        watched = keys if i % 16 == 0 else keys[:8]
        assert [index.get(table, each) for each in watched] == [kept.get(each, NOBODY) for each in watched]
    assert not table[:, 0].any()
