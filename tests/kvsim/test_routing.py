"""Routers that look into prefix caches: their rules by hand, their choices against every other choice."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import HOST, MODEL, setup, trace

from kvsim.engine.testing import CANDIDATE, routing
from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate
from kvsim.scenario.tenants import Tenant

GIB = 1 << 30
BLOCK = 512
SMALL = replace(MODEL, name="small", layers=MODEL.layers[:4])
CACHED = {"prefix_cache_hbm_bytes": 40 * GIB, "model": SMALL, "gpus": 3}

ALONE = replace(HOST, gpus_max=1, gpus_per_switch=1)  # each replica has a DDR of its own


def candidate(requests=0, tokens=0, cached=0, ttft_s=0.0):
    return requests, tokens, cached, ttft_s, 0.0


def chosen(choose, *candidates):
    return choose(np.array([*candidates], dtype=CANDIDATE), len(candidates))


def test_affinity_by_hand():
    assert chosen(routing.prefix_affinity, candidate(cached=512), candidate(cached=1024), candidate()) == 1
    # Two hold as much of it: the less loaded one. Nobody holds any: the least loaded of all.
    two = candidate(cached=512, tokens=9), candidate(cached=512, tokens=8)
    assert chosen(routing.prefix_affinity, *two, candidate()) == 1
    assert chosen(routing.prefix_affinity, candidate(tokens=9), candidate(tokens=7), candidate(tokens=8)) == 1
    # The guard takes both: more than 64 requests above the least, and more than 1.5 times as many.
    hot = candidate(requests=100 + 65, tokens=10**6, cached=1024)
    assert chosen(routing.prefix_affinity, hot, candidate(requests=100, tokens=500)) == 1
    assert chosen(routing.prefix_affinity, hot, candidate(requests=101, tokens=500)) == 0
    assert chosen(routing.prefix_affinity, hot, candidate(requests=111, tokens=500)) == 0
    assert (routing.BALANCE_REQUESTS, routing.BALANCE_RATIO) == (64, 1.5)


CANDIDATES = st.lists(
    st.tuples(
        st.integers(0, 200), st.integers(0, 9), st.integers(0, 3), st.sampled_from([0.1, 0.2, 0.3]), st.just(0.0)
    ),
    min_size=1,
    max_size=6,
)


@given(candidates=CANDIDATES)
def test_the_choice_by_its_definition(candidates):
    """Of all replicas, none is better by the rule, and none as good stands before it."""
    loads = [requests for requests, *_ in candidates]
    guard = any(a - b > 64 and a > 1.5 * b for a in loads for b in loads)
    for choose, rank in (
        (routing.prefix_affinity, lambda _requests, tokens, cached, *_: (0 if guard else -cached, tokens)),
        (routing.kv_aware, lambda _requests, tokens, _cached, ttft_s, *_: (ttft_s, tokens)),
    ):
        best = chosen(choose, *candidates)
        for i, other in enumerate(candidates):
            assert rank(*other) >= rank(*candidates[best])
            assert i >= best or rank(*other) > rank(*candidates[best])


def conversations(seed, sessions=12, turns=6, span_s=60.0, outputs=20):
    """Sessions whose prompts grow by one to four blocks a turn, interleaved at random."""
    rng = np.random.default_rng(seed)
    rows = []
    for session in range(sessions):
        grown = np.cumsum(rng.integers(1, 5, turns))
        for at, blocks in zip(np.sort(rng.uniform(0, span_s, turns)), grown, strict=True):
            rows.append((at, 1000 * session + np.arange(blocks), session))
    rows.sort(key=lambda row: row[0])
    return trace(
        [at for at, _, _ in rows],
        [BLOCK * len(ids) for _, ids, _ in rows],
        outputs,
        block_tokens=BLOCK,
        block_ids=np.concatenate([ids for _, ids, _ in rows]),
        block_counts=[len(ids) for _, ids, _ in rows],
        session=[session for _, _, session in rows],
    )


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_sessions_go_where_their_prefix_lies(fidelity):
    """With room for everything, affinity hits all that an infinite cache would; round robin far less."""
    requests = conversations(1, outputs=20 if fidelity == "step" else 3)
    cached = {}
    for router in ("round-robin", "least-loaded", "prefix-affinity", "kv-aware"):
        result = simulate(requests, setup(router=router, fidelity=fidelity, **CACHED))
        assert (result.requests["status"] == "finished").all()
        cached[router] = result.requests["cached_tokens"].sum()
        if router == "prefix-affinity":
            for session in range(12):
                assert len(set(result.requests["replica"][requests.session == session].tolist())) == 1
    ids = [requests.blocks(i).tolist() for i in range(len(requests))]
    seen, most = set(), 0
    for blocks in ids:
        hits = sum(block in seen for block in blocks)
        most += min(BLOCK * hits, BLOCK * len(blocks) - 1)
        seen |= set(blocks)
    assert cached["prefix-affinity"] == most
    assert cached["kv-aware"] > 1.5 * cached["round-robin"]
    assert cached["prefix-affinity"] > 1.5 * cached["round-robin"]


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_affinity_never_hits_less_than_round_robin(seed):
    requests = conversations(seed, sessions=4, turns=3, outputs=1)
    hits = [
        simulate(requests, setup(router=router, **CACHED)).requests["cached_tokens"].sum()
        for router in ("round-robin", "prefix-affinity")
    ]
    assert hits[0] <= hits[1]


def forced(choices, requests, s):
    """The result when requests go where `choices` say: tenants who share what is cached are pinned there."""
    names = tuple(f"to {number}" for number in range(s.replicas))
    pinned = {name: Tenant(replicas=(number, number)) for number, name in enumerate(names)}
    asked = replace(requests, tenant=np.array(choices, np.int32), tenants=names)
    return simulate(asked, replace(s, tenants=pinned, prefix_cache_sharing="all"))


@pytest.mark.parametrize("ddr", [False, True])
def test_kv_aware_finds_the_smallest_ttft_of_all_replicas(ddr):
    """Prompts one after the other: for each request, the choice is the replica on which a whole run has the least TTFT.

    With the choices before it given, every replica is tried by a simulation of its own. (Where a session's turn before
    has not been stored yet, no look into the caches could know.)
    """
    requests = conversations(3, sessions=5, turns=4, span_s=0.3, outputs=1)
    options = {**CACHED, "gpus": 2, "max_num_seqs": 1, "max_num_batched_tokens": 1 << 14}
    if ddr:
        options |= {"prefix_cache_hbm_bytes": 0, "prefix_cache_ddr_bytes": 100 * GIB, "host": ALONE}
    s = setup(router="kv-aware", **options)
    found = simulate(requests, s).requests
    choices = found["replica"].tolist()
    for index in range(len(requests)):
        ttfts = [
            forced([*choices[:index], other, *choices[index + 1 :]], requests, s).requests["first_token_s"][index]
            for other in range(s.replicas)
        ]
        assert ttfts[choices[index]] <= min(ttfts) + 1e-9
        assert ttfts[choices[index]] == found["first_token_s"][index]
    assert len(set(choices)) == s.replicas


def test_kv_aware_without_anything_cached_is_least_loaded():
    """Prompts that share nothing, alike and all at once: the shortest queue is that of the fewest tokens."""
    requests = trace([0.0] * 20, 4 * BLOCK, 3, block_tokens=BLOCK, block_ids=np.arange(80), block_counts=[4] * 20)
    aware, loaded = (simulate(requests, setup(router=router, **CACHED)) for router in ("kv-aware", "least-loaded"))
    assert aware.requests["replica"].tolist() == loaded.requests["replica"].tolist()
    assert aware.requests["finish_s"].tobytes() == loaded.requests["finish_s"].tobytes()


def test_a_hot_prefix_does_not_swamp_a_replica():
    """300 requests of one prefix at once: affinity alone would send all to one of three replicas."""
    ids = [block for i in range(301) for block in (7, 8, 1000 + i)]
    requests = trace([0.0, *[5.0] * 300], 3 * BLOCK, 2, block_tokens=BLOCK, block_ids=ids, block_counts=[3] * 301)
    result = simulate(requests, setup(router="prefix-affinity", **CACHED))
    each = np.bincount(result.requests["replica"], minlength=3)
    assert each.min() >= 300 / 3 - routing.BALANCE_REQUESTS
    assert each.max() > each.min()


def test_a_cache_router_without_caches_is_refused():
    with pytest.raises(ValueError, match=r"router=kv-aware looks into prefix caches.*prefix_cache_hbm.*least-loaded"):
        setup(router="kv-aware")
    with pytest.raises(ValueError, match="has no block ids"):
        simulate(trace([0.0], 100, 2), setup(router="prefix-affinity", prefix_cache_hbm_bytes=GIB))
    with pytest.raises(ValueError, match=r"unknown router 'prefix'.*prefix-affinity"):
        setup(router="prefix")
    assert summarize(simulate(trace([0.0], 100, 2), setup()))["inputs"]["router"] == "round-robin"
