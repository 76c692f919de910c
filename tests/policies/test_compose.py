"""Policies side by side: by layer, by head group, by context, on hybrid models."""

from dataclasses import replace

import pytest

from kvsim.models import load_model
from policies import (
    ByContext,
    ByHeads,
    ByLayer,
    Full,
    ModelShape,
    OffloadAll,
    Policy,
    Quest,
    Reuse,
    ShadowKV,
    SinkWindow,
    SnapKV,
    SqueezedAttention,
    Step,
    parse_policy,
    plan_end,
    plan_layer,
    resolve,
    reuse_of,
)
from policies.plan import Compute, Tier, flops, moved_bytes, stored_bytes
from policies.plan_rules import check_plan

LLAMA = load_model("llama-3.1-8b")  # 32 layers, 8 KV heads of 128: 4,096 bytes a token and layer
KV, PAIR = 4096, 16384
STEP = Step.decoding(9999, 1)  # 10,000 tokens held


def stored(policy: Policy, step: Step = STEP, model: ModelShape = LLAMA) -> dict[Tier, int]:
    return dict(stored_bytes([plan_layer(policy, model, step, layer).buffers for layer in range(model.n_layers)]))


def test_layers_keep_what_their_own_policy_keeps() -> None:
    policy = ByLayer(parts=((0, 1, Full()), (31, 31, SinkWindow(sink_tokens=4, window_tokens=96))), otherwise=SnapKV())
    assert stored(policy) == {Tier.HBM: (2 * 10_000 + 100 + 29 * 2049) * KV}
    assert [resolve(policy, LLAMA, STEP, layer).name for layer in (0, 1, 2, 30, 31)] == [
        *("full", "full", "snapkv", "snapkv", "sink-window"),
    ]


def test_head_groups_share_a_layer_in_proportion() -> None:
    policy = ByHeads(parts=((2, Full()), (6, SinkWindow(sink_tokens=4, window_tokens=96))))
    assert stored(policy) == {Tier.HBM: 32 * (2 * 10_000 + 6 * 100) * KV // 8}
    plan = plan_layer(policy, LLAMA, STEP, 0)
    check_plan(plan.ops, plan.buffers, plan.counts)
    attention = tuple(op for op in plan.ops if op.name in ("h0.attend", "h1.attend"))
    assert flops(attention, {}) == PAIR * 10_000 * 2 // 8 + PAIR * 100 * 6 // 8
    assert plan.ops[-1].name == "attend"
    assert plan.ops[-1].after == ("h0.attend", "h1.attend")


def test_head_groups_keep_counts_copies_and_waits_apart() -> None:
    policy = ByHeads(parts=((4, ShadowKV(budget_tokens=512)), (4, OffloadAll())))
    plan = plan_layer(policy, LLAMA, STEP, 0)
    check_plan(plan.ops, plan.buffers, plan.counts)
    assert [(count.name, count.heads) for count in plan.counts] == [("h0.miss", 4)]
    # 10 missed chunks of 8 values of 256 bytes, and half the heads of every earlier token.
    moved = moved_bytes(plan.ops, plan.buffers, {"h0.miss": 10})
    assert moved == {(Tier.DDR, Tier.HBM): 10 * 8 * 256 + 9999 * KV // 2, (Tier.HBM, Tier.DDR): KV // 2}
    fetch = next(op for op in plan.ops if op.name == "h1.fetch")
    assert fetch.after == ("h1.attend@-2", "h1.store@-2")


def test_head_groups_scale_with_tensor_parallel_ranks() -> None:
    policy = ByHeads(parts=((2, Full()), (6, SinkWindow())))
    whole, rank = stored(policy)[Tier.HBM], stored(policy, model=LLAMA.shard(2))[Tier.HBM]
    assert 2 * rank == whole


def test_head_groups_must_add_up() -> None:
    message = r"head groups of 7 KV heads do not fit layer 0 .* which has 8; make heads= add up to 8"
    with pytest.raises(ValueError, match=message):
        plan_layer(ByHeads(parts=((2, Full()), (5, Full()))), LLAMA, STEP, 0)
    with pytest.raises(ValueError, match=r"head groups of 8 KV heads do not fit layer 0 .*, which has 2"):
        plan_layer(ByHeads(parts=((1, Full()), (7, SinkWindow()))), LLAMA.shard(4), STEP, 0)


def test_short_prompts_take_the_other_policy() -> None:
    policy = ByContext(below_tokens=8000, short=Full(), long=SnapKV())
    short = Step.decoding(7999, 5)
    assert stored(policy, short) == {Tier.HBM: 32 * 8004 * KV}
    assert resolve(policy, LLAMA, Step.decoding(8000, 1), 0) == SnapKV()


def test_compositions_nest() -> None:
    late = ByHeads(parts=((4, Full()), (4, Quest())))
    policy = ByContext(below_tokens=100, short=Full(), long=ByLayer(parts=((0, 15, Full()),), otherwise=late))
    assert resolve(policy, LLAMA, STEP, 3) == Full()
    assert resolve(policy, LLAMA, STEP, 20) == late
    plan = plan_layer(policy, LLAMA, STEP, 20)
    check_plan(plan.ops, plan.buffers, plan.counts)
    assert {"h0.kv", "h1.keys", "h1.bounds"} <= {buffer.name for buffer in plan.buffers}


@pytest.mark.parametrize("name", ["gemma-3-4b", "gpt-oss-20b", "jamba-1.5-mini"])
@pytest.mark.parametrize("text", ["shadowkv", "quest", "offload-all", "full@heads=2+sink-window@heads=2"])
def test_hybrids_keep_the_dense_cache_where_a_layer_has_a_design_of_its_own(name: str, text: str) -> None:
    model = load_model(name)
    policy = parse_policy(text.replace("heads=2", f"heads={4 if name != 'gemma-3-4b' else 2}"))
    for layer, shape in enumerate(model.layers):
        expected = policy if shape.kind == "full" else Full()
        assert resolve(policy, model, STEP, layer) == expected
        plan = plan_layer(policy, model, STEP, layer)
        check_plan(plan.ops, plan.buffers, plan.counts)


def test_a_policy_needs_keys_per_head() -> None:
    model = load_model("deepseek-v3")
    message = (
        "shadowkv needs keys per KV head, but layer 0 of deepseek-v3 caches an MLA latent; use full or offload-all"
    )
    with pytest.raises(ValueError, match=message):
        plan_layer(ShadowKV(), model, STEP, 0)
    for policy in (Full(), OffloadAll()):
        assert resolve(policy, model, STEP, 0) == policy


def test_a_layer_that_reads_another_ones_cache_needs_it_dense() -> None:
    layers = (*LLAMA.layers[:31], replace(LLAMA.layers[31], share_kv_with=30))
    model = replace(LLAMA, layers=layers)
    assert stored(Full(), model=model) == {Tier.HBM: 31 * 10_000 * KV}
    mixed = ByLayer(parts=((30, 30, Full()),), otherwise=SnapKV())
    assert resolve(mixed, model, STEP, 31) == Full()
    message = (
        "layer 31 of llama-3.1-8b reads the cache of layer 30, which snapkv does not leave as it is; use full@layers"
    )
    with pytest.raises(ValueError, match=message):
        resolve(SnapKV(), model, STEP, 31)


def test_the_threshold_of_squeezed_attention_pools_its_own_layers_and_heads() -> None:
    step = Step(prompt_tokens=1100, past_tokens=0, new_tokens=1100)  # 1,000 keys are clustered around 50 centroids

    def searched(policy: Policy, model: ModelShape = LLAMA) -> list[int]:
        return [op.rows.fixed for op in plan_end(policy, model, step) if isinstance(op, Compute)]

    squeezed = SqueezedAttention()
    assert searched(squeezed) == [32 * 8 * 50]
    assert searched(ByLayer(parts=((0, 1, Full()), (10, 19, SnapKV())), otherwise=squeezed)) == [20 * 8 * 50]
    assert searched(ByHeads(parts=((2, Full()), (6, squeezed)))) == [32 * 6 * 50]
    gemma = load_model("gemma-3-4b")  # 5 of 34 layers are full, with 4 KV heads
    assert searched(squeezed, gemma) == [5 * 4 * 50]
    assert searched(ByHeads(parts=((1, Full()), (3, squeezed))), gemma) == [5 * 3 * 50]
    assert searched(ByLayer(parts=((0, 7, SqueezedAttention(keep=0.2)),), otherwise=squeezed)) == [
        8 * 8 * 50,
        24 * 8 * 50,
    ]
    assert plan_end(squeezed, LLAMA, Step(prompt_tokens=1100, past_tokens=0, new_tokens=1000)) == ()
    assert plan_end(Full(), LLAMA, step) == ()


def test_a_composition_can_be_reused_as_its_least_reusable_part() -> None:
    assert reuse_of(Quest()) is Reuse.BLOCKS
    assert reuse_of(ByLayer(parts=((0, 1, Full()),), otherwise=ShadowKV())) is Reuse.PREFIX
    assert reuse_of(ByHeads(parts=((2, ShadowKV()), (6, SinkWindow())))) is Reuse.NOTHING
    assert reuse_of(ByContext(below_tokens=10, short=Full(), long=OffloadAll())) is Reuse.BLOCKS


def test_impossible_compositions_are_refused() -> None:
    with pytest.raises(ValueError, match="layers=3-1 of full must be a range such as 0-1"):
        ByLayer(parts=((3, 1, Full()),), otherwise=ShadowKV())
    with pytest.raises(ValueError, match="layers=1-4 of quest overlap layers=0-1 of full"):
        ByLayer(parts=((0, 1, Full()), (1, 4, Quest())), otherwise=ShadowKV())
    with pytest.raises(ValueError, match="layers=30-32 of full: the model's layers are 0-31"):
        plan_layer(ByLayer(parts=((30, 32, Full()),), otherwise=ShadowKV()), LLAMA, STEP, 0)
    with pytest.raises(ValueError, match="below=0 must be at least 1 token"):
        ByContext(below_tokens=0, short=Full(), long=ShadowKV())
    with pytest.raises(ValueError, match="by-heads needs at least one part"):
        ByHeads(parts=())
    with pytest.raises(ValueError, match="heads=0 of full must be at least 1"):
        ByHeads(parts=((0, Full()), (8, ShadowKV())))
    with pytest.raises(ValueError, match="a head group cannot be by-layer; split by layer or context first"):
        ByHeads(parts=((8, ByLayer(parts=(), otherwise=Full())),))
