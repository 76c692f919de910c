"""Recorded runs replayed through the plans, against bytes counted by hand.

Llama-3.1-8B: 8 KV heads of 128 in bf16, so a key or a value of one head has 256 bytes, a token's of a layer 4,096.
"""

import numpy as np
import pytest

from kvsim.models import load_model
from kvsim.plans.replay import replay_held_bytes, replay_moved_bytes
from policies import parse_policy
from policies.plan import Tier
from traces.counts import Drawn, Recording

LLAMA = load_model("llama-3.1-8b")
DOWN, UP = (Tier.HBM, Tier.DDR), (Tier.DDR, Tier.HBM)
KV = 4096


def recording(*steps: tuple[int, ...], **counts: tuple[list[int], list[list[int]], int]) -> Recording:
    """Steps as (sequence, layer, first prompt, prompt, past, new); counts as (rows, values, maximum of every head)."""
    drawn = {}
    for name, (row, value, maximum) in counts.items():
        values = np.array(value, dtype=np.int64)
        drawn[name] = Drawn(np.array(row, dtype=np.int64), values, np.full_like(values, maximum))
    return Recording(np.array(steps, dtype=np.int64).reshape(-1, 6), drawn)


def test_offload_all_sends_new_rows_down_and_all_earlier_ones_up() -> None:
    run = recording((0, 3, 100, 100, 0, 100), (0, 3, 100, 100, 100, 1), (0, 3, 100, 100, 101, 1))
    # Down: the prompt's 100 tokens, then one at each step. Up: the 100, then the 101 tokens before the new one.
    expected = {DOWN: 102 * KV, UP: (100 + 101) * KV}
    assert replay_moved_bytes(run, parse_policy("offload-all"), LLAMA) == expected
    assert replay_moved_bytes(run, parse_policy("full"), LLAMA) == {}


def test_two_sequences_and_layers_add_up() -> None:
    steps = [(sequence, layer, 70, 70, 0, 70) for sequence in (0, 1) for layer in (0, 7)]
    assert replay_moved_bytes(recording(*steps), parse_policy("offload-all"), LLAMA) == {DOWN: 4 * 70 * KV}


def test_shadowkv_fetches_the_chunks_that_it_missed() -> None:
    misses = [[5, 0, 1, 128, 0, 0, 0, 2], [0, 0, 0, 0, 0, 0, 0, 1]]
    run = recording(
        (0, 3, 8192, 8192, 0, 8192),
        (0, 3, 8192, 8192, 8192, 1),
        (0, 3, 8192, 8192, 8193, 1),
        miss=([1, 2], misses, 128),
    )
    # 8,192 tokens are 1,024 chunks of 8, less 4 local ones, rounded down to a multiple of 8: 1,016 of each head leave
    # for the host, 8 values of 128 bf16 numbers each. 136 and 1 of them come back.
    chunk = 8 * 128 * 2
    expected = {DOWN: 8 * 1016 * chunk, UP: (136 + 1) * chunk}
    assert replay_moved_bytes(run, parse_policy("shadowkv:budget_tokens=1024"), LLAMA) == expected


def test_the_first_prompt_settles_the_policy_for_later_turns() -> None:
    policy = parse_policy("full@below=50+offload-all")
    short = recording((0, 0, 40, 40, 0, 40), (0, 0, 40, 90, 40, 50))
    assert replay_moved_bytes(short, policy, LLAMA) == {}
    long = recording((0, 0, 60, 60, 0, 60), (0, 0, 60, 90, 60, 30))
    assert replay_moved_bytes(long, policy, LLAMA) == {DOWN: 90 * KV, UP: 60 * KV}


def test_held_bytes_have_room_for_what_is_to_come() -> None:
    steps = [(sequence, layer, 100, 100, 0, 100) for sequence in (0, 1) for layer in (4, 5, 6)]
    held = replay_held_bytes(recording(*steps), parse_policy("offload-all"), LLAMA, max_new_tokens=10)
    # For each sequence 110 tokens of three layers on the host, and two staging buffers in turn for all layers.
    assert held == {Tier.DDR: 2 * 3 * 110 * KV, Tier.HBM: 2 * 2 * 110 * KV}


def test_a_ring_stays_as_large_as_the_prompt_needed_it() -> None:
    policy = parse_policy("infllm")
    decode = (0, 0, 8192, 8192, 8192, 1)
    alone = replay_held_bytes(recording(decode), policy, LLAMA, max_new_tokens=8)
    after = replay_held_bytes(recording((0, 0, 8192, 8192, 0, 8192), decode), policy, LLAMA, max_new_tokens=8)
    # Of the 16 execution blocks of 512 tokens those from token 4,608 on find a block behind 4,096 + 128 + 128 tokens:
    # 7 of them, each with 16 ids and 16 slots of 8 bytes, where decoding has one such row; in HBM and on the host.
    rows = 6 * 2 * 16 * 8
    assert after == {tier: nbytes + rows for tier, nbytes in alone.items()}


def test_a_recording_of_another_policy_or_model_is_refused() -> None:
    run = recording((0, 3, 8192, 8192, 8192, 1), miss=([0], [[1] * 8], 128))
    with pytest.raises(
        ValueError, match=r"step 0 \(sequence 0, layer 3, .* drew miss of at most 1024 where full draws"
    ):
        replay_moved_bytes(run, parse_policy("full"), LLAMA)
    with pytest.raises(ValueError, match=r"shadowkv draws miss of at most 2048 on llama-3.1-8b; replay it with"):
        replay_moved_bytes(run, parse_policy("shadowkv:budget_tokens=2048"), LLAMA)
    with pytest.raises(ValueError, match="drew nothing where shadowkv draws miss"):
        replay_moved_bytes(recording((0, 3, 8192, 8192, 8192, 1)), parse_policy("shadowkv:budget_tokens=1024"), LLAMA)
    with pytest.raises(ValueError, match=r"has a layer 32, and llama-3\.1-8b has 32"):
        replay_moved_bytes(recording((0, 32, 9, 9, 0, 9)), parse_policy("full"), LLAMA)
