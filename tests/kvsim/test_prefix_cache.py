"""Prefix caching: what hits, what it costs, what a larger tier changes."""

from dataclasses import replace

import numpy as np
import pytest
from cached_prompts import Cache, prompts
from simulated import setup, trace

import traces
from kvsim.engine.testing import HBM
from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate
from policies import Reuse
from traces.stats import infinite_cache_hit_ratio, info, lru_hit_ratio, prefix_lru_hit_ratio

GIB = 1 << 30
TOKEN_BYTES = 131072  # Llama-3.1-8B, bf16
BLOCK = 512


def chain(*blocks_per_request, **kwargs):
    """Requests whose prompts are whole blocks with these ids, far enough apart not to meet."""
    lengths = [BLOCK * len(b) for b in blocks_per_request]
    ids = [i for b in blocks_per_request for i in b]
    counts = [len(b) for b in blocks_per_request]
    arrivals = 100.0 * np.arange(len(lengths))
    return trace(arrivals, lengths, 2, block_tokens=BLOCK, block_ids=ids, block_counts=counts, **kwargs)


def hits(result, tier):
    return result.cache[tier]["hit_blocks"], result.cache[tier]["lookup_blocks"]


def test_lru_keeps_what_was_used_last():
    cache = Cache(prompts([[1], [2], [3], [4], [9, 10, 11, 12]]), hbm=3)
    for index in range(3):
        assert cache.put(HBM, index) == (1, [])
    cache.accept(0, cache.match(0))
    assert cache.put(HBM, 3) == (1, [2])
    assert cache.held(HBM) == {1, 3, 4}
    assert cache.put(HBM, 0) == (0, [])
    assert cache.tier(HBM)["used_bytes"] == 3 * 16


def test_an_entry_larger_than_the_tier_stays_out():
    """State that spans a prompt is one entry: of four blocks it does not fit three, nor does it push out what does."""
    cache = Cache(prompts([[1, 2], [9, 10, 11, 12]]), hbm=3, reuse=Reuse.PREFIX)
    assert cache.put(HBM, 0) == (1, [])
    assert cache.put(HBM, 1) == (0, [])
    assert cache.tier(HBM)["used_bytes"] == 2 * 16


def test_a_chain_is_evicted_from_its_tail():
    """Two blocks of room and a chain of three: the head stays, since a tail without its head is of no use."""
    cache = Cache(prompts([[7, 8, 9], [8, 9], [9]]), hbm=2)
    cache.store(0)
    assert cache.blocks(0) == (2, 0, 0, 0)
    assert cache.blocks(1) == (1, 0, 0, 0)  # an id is a hit wherever it stands first
    assert cache.match(2)["tokens"] == 0


def test_a_chain_longer_than_the_tier_is_written_once():
    """What stands in DDR already is not written again, though the chain's tail finds no room."""
    cache = Cache(prompts([[1, 2, 3, 4, 5]]), ddr=3)
    assert cache.store(0) == 3 * 16
    assert cache.store(0) == 0
    assert cache.blocks(0) == (0, 3, 0, 0)


def test_a_tail_without_an_id_may_be_another_prompt():
    """Equal ids of the full blocks say nothing about the rest: state that spans a prompt is not reused then."""
    requests = replace(prompts([[1, 2], [1, 2], [1, 2, 3]]), prompt_tokens=2 * 16 + np.array([5, 9, 5]))
    cache = Cache(requests, hbm=100, reuse=Reuse.PREFIX)
    cache.store(0)
    assert cache.match(1)["tokens"] == 0
    cache.store(2)  # as Mooncake does: the tail has an id of its own
    assert cache.match(2)["tokens"] == 2 * 16 + 4


def test_hits_save_prefill_and_are_counted_by_block():
    requests = chain([0, 1, 2, 3], [0, 1, 4], [5, 1])
    cold = simulate(requests, setup("full"))
    warm = simulate(requests, setup("full", prefix_cache_hbm_bytes=40 * GIB))
    assert hits(warm, "hbm") == (2, 9)  # the third prompt starts with block 5: its block 1 is no prefix
    assert warm.requests["cached_tokens"].tolist() == [0, 2 * BLOCK, 0]
    assert summarize(warm)["tokens"]["prompt_cached"] == 2 * BLOCK
    saved = cold.requests["first_token_s"] - warm.requests["first_token_s"]
    assert saved[0] == saved[2] == pytest.approx(0, abs=1e-9)
    assert saved[1] > 0


def test_a_wholly_cached_prompt_still_computes_one_token():
    result = simulate(chain([0, 1], [0, 1]), setup("full", prefix_cache_hbm_bytes=40 * GIB))
    assert result.requests["cached_tokens"].tolist() == [0, 2 * BLOCK - 1]
    assert hits(result, "hbm") == (2, 4)


def test_ddr_hits_cross_pcie_in_exact_bytes_and_time():
    requests = chain([0, 1, 2], [0, 1, 3])
    s = setup("full", prefix_cache_ddr_bytes=100 * GIB)
    result = simulate(requests, s)
    block_bytes = BLOCK * TOKEN_BYTES
    assert result.traffic["ddr->hbm"]["prefix"] == 2 * block_bytes
    assert result.traffic["hbm->ddr"]["prefix"] == (3 + 1) * block_bytes  # written through, each block once
    assert hits(result, "ddr") == (2, 6)
    assert hits(result, "hbm") == (0, 0)
    load_s = s.gpu.rates.pcie_latency_s + 2 * block_bytes / min(s.gpu.rates.pcie_h2d_Bps, s.host.switch_Bps)
    hot = simulate(requests, replace(s, prefix_cache_ddr_bytes=0, prefix_cache_hbm_bytes=40 * GIB))
    slower = result.requests["first_token_s"][1] - hot.requests["first_token_s"][1]
    assert slower == pytest.approx(load_s, rel=1e-6)


def test_what_offload_all_caches_needs_no_way_up():
    result = simulate(chain([0, 1], [0, 1, 2]), setup("offload-all", prefix_cache_ddr_bytes=100 * GIB))
    assert hits(result, "ddr") == (2, 5)
    assert result.traffic["ddr->hbm"]["prefix"] == 0


def test_state_that_spans_a_prompt_hits_only_the_same_prompt():
    requests = chain(list(range(12)), list(range(13)), list(range(12)))
    result = simulate(requests, setup("shadowkv", prefix_cache_ddr_bytes=100 * GIB))
    assert result.requests["cached_tokens"].tolist() == [0, 0, 12 * BLOCK - 1]


def test_a_policy_that_forgets_caches_nothing():
    result = simulate(chain([0, 1], [0, 1]), setup("snapkv", prefix_cache_hbm_bytes=GIB))
    assert result.requests["cached_tokens"].sum() == 0


def test_served_one_after_the_other_an_ample_cache_hits_what_an_infinite_one_does():
    # Spread inside their ticks: two that arrive at once cannot hit each other.
    requests = traces.load("mooncake-conversation:spread_s=3", limit=300).scaled_rate(1e-4)
    ratio = info(requests)["infinite_cache_hit_ratio"]
    host = replace(setup().host, ddr_bytes=64 << 40)
    result = simulate(requests, setup("full", host=host, prefix_cache_ddr_bytes=32 << 40))
    hit, lookups = hits(result, "ddr")
    assert lookups == len(requests.block_ids)
    assert hit / lookups == pytest.approx(ratio, abs=1e-12)


def test_a_larger_tier_moves_the_hit_ratio_and_the_latency():
    requests = traces.load("mooncake-conversation", limit=800)
    ratios, ttfts = [], []
    for size in (20 * GIB, 200 * GIB, 1500 * GIB):
        result = simulate(requests, setup("full", gpus=2, prefix_cache_ddr_bytes=size))
        hit, lookups = hits(result, "ddr")
        ratios.append(hit / lookups)
        ttfts.append(summarize(result)["ttft_s"]["mean"])
    assert ratios[0] < ratios[1] < ratios[2]
    assert ttfts[0] > ttfts[1] > ttfts[2]


def test_a_cache_without_block_ids_is_refused():
    with pytest.raises(ValueError, match=r"trace 'test' has no block ids.*--prefix-cache"):
        simulate(trace([0.0], 100, 2), setup("full", prefix_cache_hbm_bytes=GIB))


def branching(seed, n=60):
    """Prompts of one to six blocks along the branches of a random tree, far enough apart not to meet."""
    rng = np.random.default_rng(seed)
    numbers, asked = {}, []
    for _ in range(n):
        path = tuple(rng.integers(0, 2, rng.integers(1, 7)).tolist())
        asked.append([numbers.setdefault(path[: i + 1], len(numbers)) for i in range(len(path))])
    return chain(*asked)


@pytest.mark.parametrize("blocks", [1, 3, 10, 25, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_a_traces_prefix_lru_is_the_simulators(seed, blocks):
    """One replica that serves one request after the other, with room for so many blocks."""
    requests = branching(seed)
    result = simulate(requests, setup(prefix_cache_ddr_bytes=blocks * BLOCK * TOKEN_BYTES))
    hit, asked = hits(result, "ddr")
    assert prefix_lru_hit_ratio(requests, blocks) == hit / asked
    assert asked == len(requests.block_ids)


def test_a_prefix_lru_by_hand():
    """Room for two: the head of a chain outlives its tail, and a block behind one that is missing is no hit.

    Prompts 1-2, 3, 1-2, 4-2 (ids are of a prefix, so 2 behind 4 is not one; it tells the two definitions apart).
    """
    requests = chain([1, 2], [3], [1, 2], [4, 2])
    # Block by block: 3 displaces 1, 1 displaces 2, 2 displaces 3, and 2 is there after 4 has displaced 1.
    assert lru_hit_ratio(requests, 2) == 1 / 7
    # As a prefix cache: 3 displaces the tail 2, 1 hits; 2 comes back for 3; 4 misses, so 2 behind it is no hit.
    assert prefix_lru_hit_ratio(requests, 2) == 1 / 7
    assert prefix_lru_hit_ratio(requests, 100) == 2 / 7 < infinite_cache_hit_ratio(requests) == 1 - 4 / 7
