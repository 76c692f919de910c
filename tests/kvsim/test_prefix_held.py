"""How much of the drives and of the remote pool cached prefixes take, by hand."""

import numpy as np
import pytest
from simulated import HOST, setup, trace

from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate

BLOCK = 512
BLOCK_BYTES = BLOCK * 131072  # Llama-3.1-8B, bf16
GIB = 1 << 30


def prompts(*chains, **columns):
    """Requests of whole blocks with these ids and two output tokens, 100 s apart."""
    lengths = [BLOCK * len(chain) for chain in chains]
    blocks = {"block_ids": [key for chain in chains for key in chain], "block_counts": [len(chain) for chain in chains]}
    return trace(100.0 * np.arange(len(chains)), lengths, 2, block_tokens=BLOCK, **blocks, **columns)


@pytest.mark.parametrize("fidelity", ["step", "op"])
@pytest.mark.parametrize("tier", ["nvme", "remote"])
def test_blocks_are_held_from_the_end_of_their_prompts(tier, fidelity):
    """Room for four: two blocks come with the first token, then three of which one is known, then three for three."""
    requests = prompts([0, 1], [0, 2, 3], [4, 5, 6])
    options = {f"prefix_cache_{tier}_bytes": 4 * BLOCK_BYTES + 1000, "fidelity": fidelity}
    result = simulate(requests, setup(**options))
    first, second, third = result.requests["first_token_s"]
    assert result.makespan_s == result.requests["finish_s"][2]
    held = 2 * (second - first) + 4 * (third - second) + 4 * (result.makespan_s - third)
    node = summarize(result)["memory"]["host0.nvme" if tier == "nvme" else "remote"]
    assert node["capacity_bytes"] == (HOST.nvme_bytes if tier == "nvme" else 4 * BLOCK_BYTES + 1000)
    assert node["peak_bytes"] == 4 * BLOCK_BYTES
    assert node["mean_bytes"] == pytest.approx(held * BLOCK_BYTES / result.makespan_s, rel=1e-12)


def test_hosts_have_drives_of_their_own_and_share_a_pool():
    """Each of two hosts takes a prompt of two blocks; tenants with parts of their own fill the same drives."""
    host = {"host": HOST, "gpus": 16, "tp": 8}
    requests = prompts([0, 1], [2, 3], tenants=("a", "b"), tenant=[0, 1])
    sizes = {"prefix_cache_nvme_bytes": GIB, "prefix_cache_remote_bytes": GIB}
    memory = simulate(requests, setup(prefix_cache_quota=0.5, **sizes, **host)).memory
    peaks = {name: node["peak_bytes"] for name, node in memory.items() if name.endswith(("nvme", "remote"))}
    assert peaks == {"host0.nvme": 2 * BLOCK_BYTES, "host1.nvme": 2 * BLOCK_BYTES, "remote": 4 * BLOCK_BYTES}
    alone = simulate(requests, setup(prefix_cache_quota=0.5, prefix_cache_nvme_bytes=GIB)).memory
    assert alone["host0.nvme"]["peak_bytes"] == 4 * BLOCK_BYTES
    assert "remote" not in alone


def test_a_policy_that_caches_nothing_leaves_its_tiers_empty():
    memory = simulate(prompts([0, 1], [0, 1]), setup("sink-window", prefix_cache_nvme_bytes=GIB)).memory
    assert "host0.nvme" not in memory
