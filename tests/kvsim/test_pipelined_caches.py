"""Prefix caches, kept turns and guessed tokens on a pipeline: what stages hold, load and compute, by hand."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from simulated import GPU, HOST, MODEL, setup, trace

from kvsim.explain.pipeline import Pipelined, pipeline_s
from kvsim.plans.guessing import guesser_of
from kvsim.results.causes import spent_s
from kvsim.run.simulate import _Cluster, simulate
from kvsim.scenario.speculation import speculation

GIB = 1 << 30
BLOCK = 512
BLOCK_BYTES = BLOCK * 131072  # Llama-3.1-8B, bf16
APART = replace(HOST, gpus_per_switch=1)
FOUR = Pipelined(MODEL, GPU, HOST, pp=4)
PCIE_BPS = min(GPU.rates.pcie_h2d_Bps, APART.switch_Bps)


def prompts(*chains, arrival_s=None, outputs=1):
    """Requests of whole blocks with these ids, far enough apart not to meet unless their arrivals are given."""
    arrivals = 100.0 * np.arange(len(chains)) if arrival_s is None else arrival_s
    ids, counts = np.concatenate(chains), [len(chain) for chain in chains]
    lengths = [BLOCK * n for n in counts]
    return trace(arrivals, lengths, outputs, block_tokens=BLOCK, block_ids=ids, block_counts=counts)


def ttft_s(result):
    return result.requests["first_token_s"] - result.requests["arrival_s"]


def guessing(draft, acceptance=0.5, guesses=3):
    return speculation(MODEL, guesses, (acceptance,), None, draft, None)


@pytest.mark.parametrize("tier", ["hbm", "ddr", "nvme"])
def test_stages_load_their_layers_beside_each_other(tier):
    """Of 40 blocks 20 are cached: a load takes a quarter of its bytes over PCIe, all of them from the drives.

    What is not cached fills and drains the stages once.
    """
    chain = np.arange(40)
    requests = prompts(chain[:20], chain)
    s = setup(gpus=4, pp=4, host=APART, max_num_batched_tokens=20 * BLOCK, **{f"prefix_cache_{tier}_bytes": 40 * GIB})
    result = simulate(requests, s)
    assert result.cache[tier] == {"lookup_blocks": 60, "hit_blocks": 20}
    size, past = 5 * BLOCK, 20 * BLOCK
    chunks = [[FOUR._chunk_s(stage, 40 * BLOCK, past + size * i, size) for stage in range(4)] for i in range(4)]
    load_s = {
        "hbm": 0.0,
        "ddr": GPU.rates.pcie_latency_s + 20 * BLOCK_BYTES / 4 / PCIE_BPS,
        "nvme": HOST.nvme_latency_s + GPU.rates.pcie_latency_s + 20 * BLOCK_BYTES / HOST.nvme_read_Bps,
    }
    assert ttft_s(result)[1] == pytest.approx(load_s[tier] + pipeline_s(chunks, FOUR.send_s(size)), rel=1e-9)
    loaded, stored = (0, 0) if tier == "hbm" else (20 * BLOCK_BYTES, 40 * BLOCK_BYTES)
    assert result.traffic["ddr->hbm"]["prefix"] == loaded
    assert result.traffic["hbm->ddr"]["prefix"] == stored
    moved_s = loaded / 4 / PCIE_BPS + (GPU.rates.pcie_latency_s if loaded else 0.0)
    assert result.links["ddr->hbm"]["busy_s"] == pytest.approx(moved_s, rel=1e-9)


def test_the_widest_stage_says_how_many_blocks_its_gpu_keeps():
    """Three stages of 11, 11 and 10 layers: GPUs with room for 40.9 blocks' parts of 11 layers keep 40 whole blocks.

    In DDR, which they share, the same bytes hold 42.
    """
    part_bytes = BLOCK_BYTES * 11 // 32
    size_bytes, chain = 3 * int(40.9 * part_bytes), np.arange(60)
    assert size_bytes // BLOCK_BYTES == 42
    plain = setup(gpus=3, pp=3)
    hbm, ddr = (replace(plain, **{f"prefix_cache_{tier}_bytes": size_bytes}) for tier in ("hbm", "ddr"))
    assert sorted(map(len, plain.stages.layers)) == [10, 11, 11]
    requests = prompts(chain, chain)
    found = {tier: simulate(requests, s) for tier, s in (("none", plain), ("hbm", hbm), ("ddr", ddr))}
    assert found["hbm"].cache["hbm"]["hit_blocks"] == 40
    assert found["ddr"].cache["ddr"]["hit_blocks"] == 42
    for gpu, own in enumerate(plain.stages.layers):
        more = [found[tier].memory[f"gpu{gpu}.hbm"]["peak_bytes"] for tier in ("none", "hbm")]
        assert more[1] - more[0] == pytest.approx(40 * BLOCK_BYTES * len(own) / 32, rel=1e-6)
    kept = found["ddr"].memory["host0.ddr"]["peak_bytes"] - found["none"].memory["host0.ddr"]["peak_bytes"]
    assert kept == 42 * BLOCK_BYTES


def test_stages_on_two_hosts_keep_and_load_halves():
    """Each host's DDR and drives have two stages' parts: twice the blocks, and half the time from the drives."""
    host, chain = replace(HOST, gpus_max=2), np.arange(60)
    both, one = {}, {}
    for hosts, at in ((both, host), (one, HOST)):
        size = setup(gpus=4, pp=4, host=at, prefix_cache_ddr_bytes=20 * BLOCK_BYTES)
        hosts["ddr"] = simulate(prompts(chain, chain), size).cache["ddr"]["hit_blocks"]
        drives = simulate(prompts(chain, chain), setup(gpus=4, pp=4, host=at, prefix_cache_nvme_bytes=60 * BLOCK_BYTES))
        hosts["busy_s"] = drives.links["nvme->ddr"]["busy_s"]
        hosts["utilization"] = drives.links["nvme->ddr"]["utilization"] * drives.makespan_s
        hosts["nvme"] = [memory["peak_bytes"] for name, memory in drives.memory.items() if name.endswith("nvme")]
    assert (both["ddr"], one["ddr"]) == (40, 20)
    assert both["busy_s"] == pytest.approx(one["busy_s"], rel=1e-12)
    assert both["utilization"] == pytest.approx(one["utilization"] / 2, rel=1e-12)
    assert (both["nvme"], one["nvme"]) == ([30 * BLOCK_BYTES] * 2, [60 * BLOCK_BYTES])


@pytest.mark.parametrize("load_s", [0.02, 0.07, 0.09, 0.1, 0.12, 0.18])
def test_a_prompt_begins_when_its_prefix_is_there(load_s):
    """It comes up amid full iterations: what follows one without a gap must not have begun before that."""
    rate_Bps = 29 * BLOCK_BYTES / load_s
    host = replace(HOST, nvme_read_Bps=rate_Bps, nvme_latency_s=0.0)
    s = setup(gpus=4, pp=4, host=host, max_num_batched_tokens=8 * BLOCK, prefix_cache_nvme_bytes=40 * GIB)
    chain, others = np.arange(30), [np.arange(100 * i, 100 * i + 8) for i in range(1, 7)]
    result = simulate(prompts(chain[:29], chain, *others, arrival_s=[0.0] + [50.0] * 7), s)
    # Its iteration is full as well: four micro-batches fill and drain the stages, even if none looked back.
    chunk = [FOUR._chunk_s(stage, 8 * BLOCK, 0, 2 * BLOCK) for stage in range(4)]
    alone_s = pipeline_s([chunk] * 4, FOUR.send_s(2 * BLOCK))
    first_s = result.requests["first_token_s"][1:]
    assert result.requests["cached_tokens"][1] == 29 * BLOCK
    assert first_s[0] > 50.0 + load_s + GPU.rates.pcie_latency_s + alone_s
    assert first_s[0] < first_s.max()
    spent = list(spent_s(result.requests, "ttft").values())
    np.testing.assert_allclose(sum(spent), ttft_s(result), rtol=1e-9)


@pytest.mark.parametrize("pp", [2, 3, 4])
def test_estimates_of_prefills_are_what_a_lone_prompt_takes(pp):
    """What routers and `prefix_cache_reuse: cheaper` ask, for one chunk and several, few tokens and many.

    Three stages are of 10, 11 and 11 layers.
    """
    chain = np.arange(200)
    s = setup(gpus=pp, pp=pp, prefix_cache_hbm_bytes=20 * GIB)
    for prompt, cached in ((1, 0), (12, 0), (12, 8), (40, 8), (100, 0), (100, 60), (100, 99)):
        requests = prompts(chain[:cached], chain[:prompt]) if cached else prompts(chain[:prompt])
        engine = _Cluster(requests, s).engine
        alone_s = ttft_s(simulate(requests, s))[-1]
        assert engine.prefill_s(prompt * BLOCK, cached * BLOCK) == pytest.approx(alone_s, rel=0.005)


def test_kept_turns_skip_what_a_cache_would():
    """The state of a turn stays on its stages, or comes back to all of them at once, and nothing else changes."""
    requests = trace([0.0, 100.0], [20 * BLOCK + 1, 40 * BLOCK], [1, 1], session=[0, 0], think_s=[np.nan, 1.0])
    s = setup(gpus=4, pp=4, host=APART, session_kv="keep", max_num_batched_tokens=20 * BLOCK)
    kept, swapped = (simulate(requests, replace(s, session_kv=how)) for how in ("keep", "swap"))
    tokens = kept.requests["cached_tokens"][1]
    assert tokens == swapped.requests["cached_tokens"][1] == 20 * BLOCK + 1
    part, rest = tokens * 131072 / 4, 20 * BLOCK - 1
    ends = [rest * i // 4 for i in range(5)]
    chunks = [
        [FOUR._chunk_s(stage, 40 * BLOCK, tokens + low, high - low) for stage in range(4)]
        for low, high in pairwise(ends)
    ]
    assert ttft_s(kept)[1] == pytest.approx(pipeline_s(chunks, FOUR.send_s(5 * BLOCK)), rel=1e-4)
    up_s = GPU.rates.pcie_latency_s + part / PCIE_BPS
    assert ttft_s(swapped)[1] - ttft_s(kept)[1] == pytest.approx(up_s, rel=1e-6)
    weighed = simulate(requests, replace(s, session_kv="cheapest"))
    assert ttft_s(weighed)[1] <= ttft_s(swapped)[1]


@pytest.mark.parametrize("draft", ["lookup", "medusa"])
def test_a_lone_sequence_verifies_on_all_stages(draft):
    """Steps of four tokens take the time of one GPU, its heads' included, and hops of four tokens; the same weights."""
    one, four = (
        simulate(trace([0.0], 60, 41), setup(gpus=pp, pp=pp, speculation=guessing(draft, acceptance=1.0)))
        for pp in (1, 4)
    )
    decode_s = [float(r.requests["finish_s"][0] - r.requests["first_token_s"][0]) for r in (one, four)]
    assert decode_s[1] == pytest.approx(decode_s[0] + 10 * sum(FOUR.send_s(4)), rel=1e-9)
    for cause in ("weights", "plans"):
        assert four.traffic["hbm->sm"][cause] == one.traffic["hbm->sm"][cause]
    assert four.traffic["gpu->gpu"]["activations"] == 3 * (60 + 10 * 4) * 8192


def test_heads_stand_on_the_last_stage():
    """Their weights are its own, and where they make it the slowest, steps of a full pipeline wait for it."""
    results = {}
    for draft in ("lookup", "medusa"):
        s = setup(gpus=4, pp=4, speculation=guessing(draft, acceptance=1.0), max_num_batched_tokens=16_000)
        results[draft] = simulate(trace([0.0] * 8, 2000, 41), s)
        assert s.weight_bytes[:3] == [rank.weight_bytes for rank in s.stages.ranks[:3]]
    heads_s = guesser_s(guesser_of(setup(speculation=guessing("medusa"))), 2)
    decode_s = {
        draft: (r.requests["finish_s"] - r.requests["first_token_s"]).max() / 10 for draft, r in results.items()
    }
    assert decode_s["medusa"] - decode_s["lookup"] == pytest.approx(4 * heads_s, rel=0.01)
    assert (results["medusa"].requests["status"] == "finished").all()


def guesser_s(guesser, sequences):
    once_s, each_s = guesser.parts[0].sum(axis=1)
    return float(once_s + sequences * each_s)
