"""What sequence-parallel schemes send, against replays of their rules, and what that means for a prefill's time."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from kvsim.__main__ import main
from kvsim.explain.sequence_parallel import VOLUMES, Split, attention_s, light_seq_sent, prefill_s, volume
from kvsim.hardware.catalogue import load_gpu, load_host
from kvsim.hardware.machine import Machine
from kvsim.models import load_model

LLAMA = load_model("llama-3-8b")  # 32 heads over 8 KV heads of 128
GQA, MHA = LLAMA.layers[0], load_model("llama-2-7b").layers[0]
MACHINE = Machine(gpu=load_gpu("h100-sxm@eager"), host=load_host("ddr5-dual-xeon"))


def split(devices, tokens=65536, layer=GQA):
    return Split(layer, tokens, devices, "bf16")


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_ring_passes_each_block_to_everybody_once(devices):
    """Replay: at every step each device sends the block that it holds to the next one."""
    held, sent = list(range(devices)), Counter()
    seen = [{block} for block in held]
    for _ in range(devices - 1):
        for device in range(devices):
            sent[device] += 1
        held = held[-1:] + held[:-1]
        for device, block in enumerate(held):
            seen[device].add(block)
    assert all(blocks == set(range(devices)) for blocks in seen)
    # A block: 2 x 8 KV heads x 128 x 2 bytes = 4,096 bytes a token.
    for scheme in ("ring", "zigzag"):
        assert volume(scheme, split(devices)).forward_bytes == sent[0] * (65536 // devices) * 4096
        assert volume(scheme, split(devices)).steps == devices - 1


@pytest.mark.parametrize("devices", [2, 4, 6, 8, 16])
def test_light_seq_computes_every_block_once(devices):
    """Each rank keeps at most half of its blocks beside its own; helpers do the rest, and send as many outputs back."""
    half, done, helped = devices // 2, Counter(), Counter()
    for rank in range(devices):
        done[rank] += min(rank, half)
        for helper in range(max(0, rank - half)):
            done[helper] += 1
            helped[helper] += 1
    assert sum(done.values()) == devices * (devices - 1) // 2
    assert max(done.values()) <= half
    own = split(devices)
    for rank in range(devices):
        forward, backward = light_seq_sent(own, rank)
        assert forward == min(half, devices - 1 - rank) * own.kv_bytes
        # An output comes with a maximum and a sum in fp32 for each of 32 heads.
        outputs = helped[rank] * own.own_tokens * 32 * (128 * 2 + 8)
        assert backward == max(0, rank - half) * own.q_bytes + outputs


def test_token_ring_pays_for_multi_head_attention_alone():
    """Per direction TokenRing / Ring = g / 2: half without groups, equal at 2, twice at 4 (queries against keys and
    values)."""
    for group, layer in ((1, MHA), (2, GQA.with_heads(16, 8)), (4, GQA), (8, GQA.with_heads(64, 8))):
        ring, token_ring = (volume(scheme, split(8, layer=layer)) for scheme in ("ring", "token-ring"))
        assert token_ring.forward_bytes * 2 == group * ring.forward_bytes
        # Back go outputs of the same size and four bytes for each token and head.
        assert token_ring.backward_bytes - token_ring.forward_bytes == 7 * 8192 * layer.heads * 4


def test_token_rings_published_steps():
    """Four A10, 24,000 tokens, 32 heads: a ring step takes 7.6 ms, one of TokenRing that sends queries only 3.5."""
    own = split(4, 24000, MHA)
    ring, token_ring = volume("ring", own), volume("token-ring", own)
    assert ring.forward_bytes / 3 == 6000 * 2 * 32 * 128 * 2
    assert ring.forward_bytes / token_ring.forward_bytes == pytest.approx(7.6 / 3.5, rel=0.1)


def test_ulysses_and_the_gather():
    # All to all keeps 1/8 of queries, keys, values and outputs: (2 x 32 + 2 x 8) x 128 x 2 bytes a token.
    assert volume("ulysses", split(8)).forward_bytes == 8192 * 80 * 256 * 7 // 8
    gathered = volume("all-gather", split(8))
    assert (gathered.forward_bytes, gathered.steps) == (7 * 8192 * 4096, 1)
    assert gathered.buffer_bytes == 7 * 8192 * 4096


@pytest.mark.parametrize("scheme", VOLUMES)
def test_one_device_sends_nothing_and_attends_alone(scheme):
    alone = volume(scheme, split(1))
    assert (alone.forward_bytes, alone.backward_bytes, alone.steps) == (0, 0, 0)
    pairs = 65536 * 65537 // 2
    expected_s = pairs * 2 * 32 * 256 / MACHINE.gpu.rates.attention_flops
    assert attention_s(scheme, split(1), MACHINE) == pytest.approx(expected_s, rel=1e-12)


def with_nvlink(Bps):
    """The machine with such links, without latency."""
    rates = replace(MACHINE.gpu.rates, nvlink_Bps=Bps, nvlink_latency_s=0.0)
    return replace(MACHINE, gpu=replace(MACHINE.gpu, rates=rates))


def test_balance_halves_a_ring_where_links_are_fast():
    """Unbalanced, the last device attends to all blocks: P - 1 whole ones and a diagonal, against halves."""
    fast = with_nvlink(1e18)
    ring, zigzag = (attention_s(scheme, split(8), fast) for scheme in ("ring", "zigzag"))
    assert ring / zigzag == pytest.approx(7.5 / 4, rel=1e-4)
    for scheme in ("zigzag", "token-ring", "ulysses", "all-gather"):
        assert attention_s(scheme, split(8), fast) == pytest.approx(attention_s(scheme, split(1), fast) / 8, rel=1e-3)


@pytest.mark.parametrize(("scheme", "blocks"), [("ring", 1), ("zigzag", 2)])
def test_an_exchange_hides_behind_blocks_that_are_long_enough(scheme, blocks):
    """m >= FLOP rate x b / (2 g bandwidth) for whole blocks (4 Hq d m^2 FLOPs against 2 Hkv d b m bytes); half blocks
    take twice that."""
    nvlink_Bps = 4e11
    edge_tokens = blocks * MACHINE.gpu.rates.attention_flops * 2 / (2 * 4 * nvlink_Bps)
    for factor in (0.5, 0.98, 1.02, 4):
        own = split(8, 8 * round(factor * edge_tokens))
        exposed = attention_s(scheme, own, with_nvlink(nvlink_Bps)) / attention_s(scheme, own, with_nvlink(1e18))
        assert exposed == pytest.approx(1, abs=1e-9) if factor > 1 else exposed > 1.01


def test_what_cannot_be_split_says_so():
    with pytest.raises(ValueError, match=r"unknown scheme 'zigzig'; did you mean 'zigzag'\?"):
        volume("zigzig", split(4))
    with pytest.raises(ValueError, match="sp=3: light-seq pairs early with late ranks; use an even number"):
        volume("light-seq", split(3))
    with pytest.raises(ValueError, match="sp=16: ulysses divides the 8 KV heads"):
        volume("ulysses", split(16))
    with pytest.raises(ValueError, match="sp=0 must be at least 1"):
        volume("ring", split(0))
    with pytest.raises(ValueError, match="priced for full attention"):
        prefill_s(load_model("gpt-oss-20b"), MACHINE, 8192, 4, "ring")


def test_the_command(capsys):
    assert (
        main(["explain", "--model", "llama-3-8b", "--gpu", "h100-sxm", "--context", "128Ki", "--sp", "8", "--json"])
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    assert [row["scheme"] for row in rows] == list(VOLUMES)
    ring = rows[0]
    assert ring["forward_bytes"] == 32 * 7 * 16384 * 4096
    assert main(["explain", "--sp", "8", "--policy", "full"]) == 2
    assert "--sp has no use for --policy" in capsys.readouterr().err
