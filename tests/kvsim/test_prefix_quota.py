"""Quotas of the prefix cache: a tenant's part is its own, whatever others do."""

from dataclasses import replace

import numpy as np
import pytest
from simulated import setup, trace

from kvsim.run.simulate import simulate
from kvsim.scenario.quotas import divided, read_quota
from kvsim.scenario.scenario_file import load_scenario

BLOCK = 512
BLOCK_BYTES = BLOCK * 131072  # Llama-3.1-8B, bf16
TENANTS = ("ann", "bob", "cid")


def prompts(*requests):
    """Requests (tenant, blocks) far enough apart not to meet."""
    chains = [chain for _, chain in requests]
    counts = [len(chain) for chain in chains]
    return trace(
        100.0 * np.arange(len(chains)),
        [BLOCK * n for n in counts],
        2,
        block_tokens=BLOCK,
        block_ids=[key for chain in chains for key in chain],
        block_counts=counts,
        tenant=[TENANTS.index(name) for name, _ in requests],
        tenants=TENANTS,
    )


def test_a_quota_keeps_a_tenants_blocks_from_the_flood_of_another():
    """Room for eight blocks: ann's four are pushed out by bob's ten, unless half of the tier is hers."""
    flood = [("bob", [100 + i, 200 + i]) for i in range(5)]
    requests = prompts(("ann", [0, 1, 2, 3]), *flood, ("ann", [0, 1, 2, 3]), ("cid", [0, 1]))
    s = setup(prefix_cache_ddr_bytes=8 * BLOCK_BYTES)
    assert simulate(requests, s).requests["cached_tokens"][6] == 0
    quota = replace(s, prefix_cache_quota={"ann": 0.5})
    assert simulate(requests, quota).requests["cached_tokens"][6] == 4 * BLOCK - 1
    assert simulate(requests, quota).requests["cached_tokens"][7] == 0  # cid is not ann
    small = replace(s, prefix_cache_quota=0.25)
    assert simulate(requests, small).requests["cached_tokens"][6] == 2 * BLOCK  # her own head, and no more


def test_tenants_with_a_quota_equal_runs_of_their_own():
    """One after the other on halves of every tier, two tenants reuse what each alone would on a cache of that half."""
    rng = np.random.default_rng(0)
    both = [(TENANTS[i % 2], [int(key) for key in range(1 + rng.integers(6))]) for i in range(40)]
    both = [(name, [10 * int(rng.integers(3)) + key for key in chain]) for name, chain in both]
    sizes = {"prefix_cache_hbm_bytes": 6, "prefix_cache_ddr_bytes": 10, "prefix_cache_nvme_bytes": 14}
    whole = {name: blocks * BLOCK_BYTES for name, blocks in sizes.items()}
    half = {name: nbytes // 2 for name, nbytes in whole.items()}
    for write in ("through", "back"):
        quota = setup(prefix_cache_quota={"ann": 0.5, "bob": 0.5}, prefix_cache_write=write, **whole)
        requests = replace(prompts(*both), tenants=TENANTS[:2])
        cached = simulate(requests, quota).requests["cached_tokens"]
        assert cached.any()
        for number, name in enumerate(TENANTS[:2]):
            own = prompts(*[item for item in both if item[0] == name])
            alone = simulate(own, setup(prefix_cache_write=write, **half)).requests["cached_tokens"]
            assert cached[number::2].tolist() == alone.tolist()


def test_tenants_that_are_not_named_share_the_rest():
    assert divided(None, TENANTS) == ([1.0], [0, 0, 0])
    assert divided(0.25, TENANTS) == ([0.25] * 3, [0, 1, 2])
    assert divided({"bob": 0.25}, TENANTS) == ([0.25, 0.75], [1, 0, 1])
    assert divided({"ann": 0.25, "bob": 0.25, "cid": 0.5}, TENANTS) == ([0.25, 0.25, 0.5], [0, 1, 2])


@pytest.mark.parametrize(
    ("quota", "message"),
    [
        (0.4, r"the shares of 3 tenants add up to 1.2, above the capacity of 1"),
        ({"ann": 0.6, "bob": 0.5}, r"the shares of 2 tenants add up to 1.1, above the capacity of 1"),
        ({"ann": 0.5, "bob": 0.5}, r"gives the whole of every tier to ann, bob and leaves nothing for cid"),
        ({"anne": 0.5}, r"unknown tenant of prefix_cache_quota 'anne'.*'ann'"),
        (0.05, r"prefix_cache_ddr: 0.05 of 512 MiB, a tenant's part of 25.6 MiB is smaller than one block of 64 MiB"),
    ],
)
def test_quotas_that_do_not_fit_are_refused(quota, message):
    with pytest.raises(ValueError, match=message):
        simulate(prompts(("ann", [0])), setup(prefix_cache_ddr_bytes=8 * BLOCK_BYTES, prefix_cache_quota=quota))


@pytest.mark.parametrize("quota", ["half", "ann=", "ann=0.5,0.2", "ann=0.5,ann=0.2", 0, 1.5, {"ann": "much"}, [0.5]])
def test_what_is_no_quota_is_refused(quota):
    with pytest.raises(ValueError, match=r"share"):
        read_quota(quota)


def test_a_quota_as_scenarios_write_it():
    base = {"trace": "t", "model": "llama-3.1-8b", "gpu": "h100-sxm", "prefix_cache_ddr": "1GiB"}
    for written, meant in ((0.25, 0.25), ("0.25", 0.25), ("a=0.5,b=0.25", {"a": 0.5, "b": 0.25}), ({"a": 1}, {"a": 1})):
        assert load_scenario({**base, "prefix_cache_quota": written}).setups()[0].prefix_cache_quota == meant
    with pytest.raises(ValueError, match="prefix_cache_quota gives tenants parts of their own"):
        load_scenario({**base, "prefix_cache_quota": 0.5, "prefix_cache_sharing": "all"}).setups()
