"""Cached prefixes on NVMe and in a remote pool: what moves over which link, when it is there, who may use it."""

from dataclasses import replace

import numpy as np
import pytest
from cached_prompts import Cache, paths_of
from cached_prompts import prompts as prompts_of
from hypothesis import given
from hypothesis import strategies as st
from simulated import HOST, setup, trace

from kvsim.engine.testing import DDR, HBM, PLACES, SLOW, prefix_cache
from kvsim.hardware.machine import DOWN, UP
from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate

GIB = 1 << 30
BLOCK = 512
BLOCK_BYTES = BLOCK * 131072  # Llama-3.1-8B, bf16
SLOW_TIERS = ("nvme", "remote")


def prompts(*chains, arrival_s=None, **columns):
    """Requests of whole blocks with these ids and two output tokens, far enough apart not to meet."""
    counts = [len(chain) for chain in chains]
    arrivals = 100.0 * np.arange(len(chains)) if arrival_s is None else arrival_s
    ids = [key for chain in chains for key in chain]
    lengths = [BLOCK * n for n in counts]
    return trace(arrivals, lengths, 2, block_tokens=BLOCK, block_ids=ids, block_counts=counts, **columns)


def hits(result):
    return {name: (tier["hit_blocks"], tier["lookup_blocks"]) for name, tier in result.cache.items()}


def ttft_s(result):
    return result.requests["first_token_s"] - result.requests["arrival_s"]


@pytest.mark.parametrize("tier", SLOW_TIERS)
@pytest.mark.parametrize("fidelity", ["step", "op"])
@pytest.mark.parametrize("slow_Bps", [3e9, 300e9])
def test_slow_blocks_come_up_in_a_pipeline(tier, fidelity, slow_Bps):
    """Alone, a load takes the latencies of its links and its bytes at the slowest of them; every byte is booked."""
    rates = {"nvme_read_Bps": slow_Bps} if tier == "nvme" else {"nic_Bps": slow_Bps}
    requests, host = prompts([0, 1, 2], [0, 1, 3]), replace(HOST, **rates)
    s = setup(fidelity=fidelity, host=host, **{f"prefix_cache_{tier}_bytes": 100 * GIB})
    result = simulate(requests, s)
    assert hits(result)[tier] == (2, 6)
    up, down = f"{tier}->ddr", f"ddr->{tier}"
    assert result.traffic[up]["prefix"] == result.traffic["ddr->hbm"]["prefix"] == 2 * BLOCK_BYTES
    assert result.traffic[down]["prefix"] == result.traffic["hbm->ddr"]["prefix"] == (3 + 1) * BLOCK_BYTES
    for link in (up, down):
        assert result.links[link]["bytes"] == sum(result.traffic[link].values())
    assert result.links[up]["busy_s"] == pytest.approx(2 * BLOCK_BYTES / min(slow_Bps, host.ddr_Bps))
    latency_s = host.nvme_latency_s if tier == "nvme" else host.nic_latency_s
    pcie_Bps = min(s.gpu.rates.pcie_h2d_Bps, host.switch_Bps)
    load_s = latency_s + s.gpu.rates.pcie_latency_s + 2 * BLOCK_BYTES / min(slow_Bps, pcie_Bps)
    hot = simulate(requests, setup(fidelity=fidelity, prefix_cache_hbm_bytes=40 * GIB))
    assert ttft_s(result)[1] - ttft_s(hot)[1] == pytest.approx(load_s, rel=1e-6)
    assert ttft_s(result)[[0]] == pytest.approx(ttft_s(hot)[[0]], rel=1e-9)


def test_ranks_load_their_shares_beside_each_other():
    """Two ranks hold half of each block and load it over PCIe links of their own; a block's bytes are booked once."""
    requests, host = prompts([0, 1, 2], [0, 1, 3]), replace(HOST, gpus_per_switch=1)
    s = setup(gpus=2, tp=2, host=host, prefix_cache_ddr_bytes=100 * GIB)
    result = simulate(requests, s)
    assert result.traffic["ddr->hbm"]["prefix"] == 2 * BLOCK_BYTES
    assert result.traffic["hbm->ddr"]["prefix"] == (3 + 1) * BLOCK_BYTES
    pcie_Bps = min(s.gpu.rates.pcie_h2d_Bps, host.switch_Bps)
    load_s = s.gpu.rates.pcie_latency_s + BLOCK_BYTES / pcie_Bps
    hot = simulate(requests, replace(s, prefix_cache_ddr_bytes=0, prefix_cache_hbm_bytes=40 * GIB))
    assert ttft_s(result)[1] - ttft_s(hot)[1] == pytest.approx(load_s, rel=1e-6)


def test_loads_of_a_hosts_replicas_queue_at_its_drives():
    """Two replicas load the same blocks at once: one host serves them in turn, two hosts beside each other."""
    requests = prompts([0, 1, 2, 3], [4], [0, 1, 2, 3], [0, 1, 2, 3], arrival_s=[0.0, 0.0, 100.0, 100.0])
    host = replace(HOST, nvme_read_Bps=2e9)
    s = setup(gpus=2, host=host, prefix_cache_nvme_bytes=100 * GIB)
    first, second = ttft_s(simulate(requests, s))[2:]
    assert second - first == pytest.approx(4 * BLOCK_BYTES / 2e9, rel=1e-6)
    pooled = replace(s, prefix_cache_nvme_bytes=0, prefix_cache_remote_bytes=100 * GIB)
    apart = replace(pooled, host=replace(host, gpus_max=1, nic_Bps=2e9))  # each has a NIC of its own
    result = simulate(requests, apart)
    first, second = ttft_s(result)[2:]
    assert second == pytest.approx(first, rel=1e-9)
    assert hits(result)["remote"] == (8, 4 + 1 + 4 + 4)  # the second replica hits what the first one stored


def test_what_was_fetched_stays_in_ddr():
    """The second prompt loads from NVMe into DDR, from where the third one takes it."""
    requests = prompts([0, 1], [2, 3], [0, 1], [0, 1])
    s = setup(prefix_cache_ddr_bytes=2 * BLOCK_BYTES, prefix_cache_nvme_bytes=GIB)
    result = simulate(requests, s)
    assert hits(result) == {"hbm": (0, 0), "ddr": (2, 8), "nvme": (2, 6)}
    assert result.traffic["nvme->ddr"]["prefix"] == 2 * BLOCK_BYTES
    assert result.traffic["ddr->hbm"]["prefix"] == 4 * BLOCK_BYTES


def test_blocks_on_their_way_are_waited_for_not_fetched_twice():
    """A prompt that hits what another one is fetching to the host's DDR starts when that has landed."""
    requests = prompts([0, 1, 2, 3], [4, 5], [0, 1, 2, 3], [0, 1, 2, 3], arrival_s=[0.0, 50.0, 100.0, 100.1])
    host = replace(HOST, nvme_read_Bps=BLOCK_BYTES / 0.5)
    s = setup(gpus=2, host=host, prefix_cache_ddr_bytes=4 * BLOCK_BYTES, prefix_cache_nvme_bytes=GIB)
    result = simulate(requests, s)
    assert hits(result)["nvme"][0] == 2  # the second prompt has pushed two out of DDR
    assert result.traffic["nvme->ddr"]["prefix"] == 2 * BLOCK_BYTES
    fetched_s = 1.0 + host.nvme_latency_s
    third, fourth = ttft_s(result)[2:]
    assert third > fetched_s
    assert fourth == pytest.approx(third - 0.1, rel=0.02)


def test_written_back_a_tier_is_written_when_the_one_above_evicts():
    """HBM of two blocks over DDR of two over NVMe: each prompt pushes the one before it one tier down."""
    requests = prompts([0, 1], [2, 3], [4, 5], [0, 1])
    s = setup(
        prefix_cache_hbm_bytes=2 * BLOCK_BYTES,
        prefix_cache_ddr_bytes=2 * BLOCK_BYTES,
        prefix_cache_nvme_bytes=GIB,
        prefix_cache_write="back",
    )
    result = simulate(requests, s)
    assert hits(result) == {"hbm": (0, 8), "ddr": (0, 8), "nvme": (2, 8)}
    moved = {link: causes["prefix"] // BLOCK_BYTES for link, causes in result.traffic.items()}
    # Down to DDR: 0 1, 2 3, and 4 5 when the last prompt is done. To NVMe: 0 1, then 2 3 when 0 1 come up to DDR, not
    # 0 1 once more when 4 5 push them out again.
    assert moved["hbm->ddr"] == 6
    assert moved["ddr->nvme"] == 4
    assert moved["nvme->ddr"] == moved["ddr->hbm"] == 2
    through = simulate(requests, replace(s, prefix_cache_write="through"))
    assert through.traffic["ddr->nvme"]["prefix"] == 6 * BLOCK_BYTES


class Counted(Cache):
    """A cache that counts what each tier takes in and gives out."""

    def __init__(self, requests, **options):
        super().__init__(requests, **options)
        self.came, self.went = [0] * PLACES, [0] * PLACES

    def counting(self, patch):
        """Count while a patch lasts."""
        put_chain = prefix_cache.put_chain

        def counted(prefixes, tier, *rest):
            added, evicted = put_chain(prefixes, tier, *rest)
            self.came[tier["memory"]] += int(added)
            self.went[tier["memory"]] += int(evicted)
            return added, evicted

        patch.setattr(prefix_cache, "put_chain", counted)


@given(
    paths=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=25),
    rooms=st.tuples(*[st.integers(0, 6)] * 4),
    write=st.sampled_from(["through", "back"]),
    order=st.sampled_from(["lru", "fifo", "lfu"]),
)
def test_bytes_by_link_are_the_blocks_that_moved(paths, rooms, write, order):
    """Every block in a slow tier came over its link, every hit left it; what is written once is not lost in between."""
    chains, block = paths_of(paths), 16
    sizes = dict(zip(("hbm", "ddr", *SLOW_TIERS), rooms, strict=True))
    cache = Counted(prompts_of(chains, block), write=write, eviction=order, **sizes)
    on = [place for place in range(PLACES) if rooms[place]]
    down_bytes, up_bytes, ever = 0, 0, set()
    with pytest.MonkeyPatch.context() as patch:
        cache.counting(patch)
        for index, chain in enumerate(chains):
            hit = cache.match(index)
            assert set(chain[: hit["found"]]) <= ever
            assert sum(hit["blocks"]) == hit["found"]
            up_bytes += hit["load_bytes"]
            cache.accept(index, hit)
            down_bytes += cache.store(index)
            ever.update(chain)
            for place in on:
                held = cache.held(place)
                assert len(held) == cache.came[place] - cache.went[place] <= rooms[place]
                assert cache.tier(place)["used_bytes"] == block * len(held)
    assert up_bytes == block * sum(int(cache.tier(place)["hit_blocks"]) for place in on if place != HBM)
    for place in on:
        if place >= SLOW:
            links = cache.arrays.links[0, place - SLOW]
            assert links[DOWN]["moved_bytes"] == block * cache.came[place]
            assert links[UP]["moved_bytes"] == block * cache.tier(place)["hit_blocks"]
    if write == "back":
        kept = set().union(*(cache.held(place) for place in on))
        if on and len(ever) <= rooms[on[-1]]:  # the lowest tier alone could hold everything, so nothing is ever lost
            assert kept == ever
    elif not any(rooms[DDR:]):
        assert down_bytes == 0


def test_a_larger_or_nearer_tier_changes_latency_as_well():
    """Served from DDR a hit is faster than from NVMe, from a slow drive than not at all only where it loads sooner."""
    requests = prompts(*[[0, 1, 2, 3, 4, 5, 6, 7, 10 + i] for i in range(4)])
    means = [
        summarize(simulate(requests, setup(**sizes)))["ttft_s"]["mean"]
        for sizes in (
            {"prefix_cache_ddr_bytes": 100 * GIB},
            {"prefix_cache_nvme_bytes": 100 * GIB, "host": replace(HOST, nvme_read_Bps=20e9)},
            {"prefix_cache_nvme_bytes": 100 * GIB, "host": replace(HOST, nvme_read_Bps=10e9)},
            {},
        )
    ]
    assert means == sorted(means)
    assert len(set(means)) == 4


def test_tenants_do_not_hit_each_others_blocks():
    """The same prompt of another tenant is a miss, unless all share; one tenant's results do not depend on it."""
    columns = {"tenant": [0, 1, 0], "tenants": ("ann", "bob")}
    requests, s = prompts([0, 1], [0, 1], [0, 1], **columns), setup(prefix_cache_hbm_bytes=GIB)
    whole = 2 * BLOCK - 1
    assert simulate(requests, s).requests["cached_tokens"].tolist() == [0, 0, whole]
    shared = simulate(requests, replace(s, prefix_cache_sharing="all"))
    assert shared.requests["cached_tokens"].tolist() == [0, whole, whole]
    alone = replace(requests, tenant=np.zeros(3, np.int32), tenants=("ann",))
    assert simulate(alone, s).requests["cached_tokens"].tolist() == [0, whole, whole]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_cache_ddr_bytes": 1 << 20}, r"prefix_cache_ddr: a tier of 1 MiB is smaller than one block of 64 MiB"),
        ({"prefix_cache_hbm_bytes": 100 << 20, "gpus": 2}, r"a tier of 50 MiB is smaller than one block of 64 MiB"),
    ],
)
def test_a_tier_smaller_than_one_block_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        simulate(prompts([0, 1]), setup(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_cache_nvme_bytes": 40 << 40}, r"prefix_cache_nvme=40 TiB exceeds the 27.94 TiB of NVMe of host"),
        ({"prefix_cache_eviction": "lruu"}, r"unknown prefix_cache_eviction 'lruu'.*'lru'"),
        ({"prefix_cache_write": "around"}, r"unknown prefix_cache_write 'around'"),
        ({"prefix_cache_sharing": "some"}, r"unknown prefix_cache_sharing 'some'"),
        ({"prefix_cache_remote_bytes": -1}, r"prefix_cache_remote_bytes=-1 must not be negative"),
        (
            {"prefix_cache_remote_bytes": 1, "host": replace(HOST, nic_Bps=0)},
            r"prefix_cache_remote needs a network, and host 'ddr5-dual-xeon' has none",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        setup(**options)
