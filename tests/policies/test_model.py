"""Cached bytes, sharding and head groups of model shapes, against counts by hand."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.model import LayerShape, ModelShape


def dense_layer(**changes: Any) -> LayerShape:
    """A layer of 8 query heads over 4 KV heads of 16, hidden 128, MLP width 256."""
    values: dict[str, Any] = {
        "kind": "full",
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 16,
        "v_head_dim": 16,
        "qkv_params": 128 * (8 + 2 * 4) * 16,
        "out_params": 8 * 16 * 128,
        "mlp_params": 3 * 128 * 256,
        "mlp_active_params": 3 * 128 * 256,
    }
    return LayerShape(**{**values, **changes})


def moe_layer() -> LayerShape:
    """8 experts of 1,000 weights, 2 used by a token, beside 500 dense weights."""
    return dense_layer(mlp_params=8500, mlp_active_params=2500, experts=8, experts_per_token=2, expert_params=1000)


SLIDING = dense_layer(kind="sliding", window_tokens=100)
LATENT = dense_layer(kind="mla", kv_heads=1, latent_dim=48)
LINEAR = dense_layer(kind="linear", state_elements=1000)


def model(*layers: LayerShape, **changes: Any) -> ModelShape:
    in_layers = sum(layer.qkv_params + layer.out_params + layer.mlp_params for layer in layers)
    return ModelShape(
        **{
            "name": "toy",
            "hidden_dim": 128,
            "vocab_size": 1000,
            "max_positions": 4096,
            "layers": layers,
            "embedding_params": 128_000,
            "head_params": 128_000,
            "params": in_layers + 256_000,
            **changes,
        }
    )


def test_kv_bytes_of_each_kind_of_layer() -> None:
    full_token = 2 * 4 * 16 * 2  # K and V, 4 heads of 16, 2 bytes
    assert model(dense_layer()).kv_bytes(300) == 300 * full_token
    assert model(SLIDING).kv_bytes(300) == 100 * full_token
    assert model(SLIDING).kv_bytes(99) == 99 * full_token
    assert model(LATENT).kv_bytes(300) == 300 * 48 * 2
    assert model(LINEAR).kv_bytes(300) == 1000 * 2
    both = model(dense_layer(), SLIDING, LATENT, LINEAR)
    assert both.kv_bytes(300) == 300 * full_token + 100 * full_token + 300 * 96 + 2000
    assert both.kv_bytes_per_token == full_token + 96


def test_a_layer_that_shares_kv_stores_nothing() -> None:
    shared = dense_layer(share_kv_with=0)
    assert model(dense_layer(), shared).kv_bytes(10) == model(dense_layer()).kv_bytes(10)
    with pytest.raises(ValueError, match="layer 1 shares the KV of layer 1; name an earlier layer"):
        model(dense_layer(), dense_layer(share_kv_with=1))


def test_quantised_kv_counts_its_scales_and_the_state_keeps_its_type() -> None:
    int8 = model(dense_layer(), LINEAR, kv_dtype="int8")
    assert int8.kv_bytes(10) == 10 * 2 * 4 * (16 + 2) + 1000 * 2
    assert model(LATENT, kv_dtype="int4").kv_bytes(10) == 10 * (24 + 4)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_kv_bytes_grow_with_tokens_by_at_most_the_unbounded_rate(short: int, more: int) -> None:
    shape = model(dense_layer(), SLIDING, LATENT, LINEAR)
    grown = shape.kv_bytes(short + more) - shape.kv_bytes(short)
    assert shape.kv_bytes_per_token * more <= grown <= (shape.kv_bytes_per_token + 256) * more


def test_experts_touched_follow_uniform_routing() -> None:
    layer = moe_layer()
    assert layer.mlp_params_touched(0) == 500
    assert layer.mlp_params_touched(1) == layer.mlp_active_params == 2500
    # Two tokens: each expert is missed with probability (3/4)^2, so 8 * 7/16 = 3.5 of them are used.
    assert layer.mlp_params_touched(2) == 500 + 3500
    assert layer.mlp_params_touched(1000) == layer.mlp_params
    assert dense_layer().mlp_params_touched(7) == 3 * 128 * 256


def test_experts_touched_agrees_with_a_simulation() -> None:
    import random

    draw, layer, trials = random.Random(1), moe_layer(), 4000
    used = sum(len({e for _ in range(5) for e in draw.sample(range(8), 2)}) for _ in range(trials))
    assert layer.experts_touched(5) == pytest.approx(used / trials, rel=0.01)


def test_weight_bytes_by_type() -> None:
    dense, params = model(dense_layer()), model(dense_layer()).params
    assert dense.weight_bytes == 2 * params
    rows = params // 128  # rows of hidden_dim elements, as all of them here are
    assert replace(dense, weight_dtype="int8").weight_bytes == rows * 130
    assert replace(dense, weight_dtype="int4").weight_bytes == rows * (64 + 2 * 4)
    mixed = model(moe_layer(), expert_dtype="mxfp4")
    # 8,000 expert weights are 62 rows of 128 (64 + 4 bytes) and 64 more (32 + 2 bytes).
    assert mixed.weight_bytes == 2 * (mixed.params - 8000) + 62 * 68 + 34
    assert mixed.mlp_bytes_touched(mixed.layers[0], 1000) == 2 * 500 + 62 * 68 + 34


def test_active_params_leave_out_the_embedding_and_idle_experts() -> None:
    layer = moe_layer()
    assert model(layer).active_params == layer.qkv_params + layer.out_params + 2500 + 128_000


def test_shard_divides_heads_and_weights() -> None:
    whole = model(dense_layer(), moe_layer())
    half = whole.shard(2)
    assert [(x.heads, x.kv_heads, x.group) for x in half.layers] == [(4, 2, 2), (4, 2, 2)]
    assert half.params * 2 == whole.params
    assert half.kv_bytes(50) * 2 == whole.kv_bytes(50)
    assert half.layers[1].expert_params == 500
    assert half.layers[1].mlp_active_params == 1250
    assert whole.shard(1) == whole


def test_shard_replicates_kv_heads_beyond_their_number() -> None:
    eighth = model(dense_layer()).shard(8)
    assert (eighth.layers[0].heads, eighth.layers[0].kv_heads) == (1, 1)
    assert eighth.kv_bytes(1) == 2 * 16 * 2  # one head on each of eight ranks, though there are only four
    assert eighth.layers[0].qkv_params == 128 * (1 + 2) * 16
    assert model(LATENT).shard(4).kv_bytes(10) == model(LATENT).kv_bytes(10)


def test_shard_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="tp=3 does not divide the 8 heads"):
        model(dense_layer()).shard(3)
    with pytest.raises(ValueError, match="tp=4 neither divides nor is a multiple of the 6 KV heads"):
        model(dense_layer(heads=12, kv_heads=6)).shard(4)
    with pytest.raises(ValueError, match="tp=0 must be at least 1"):
        model(dense_layer()).shard(0)


def test_head_groups_add_up_to_the_model() -> None:
    whole = model(dense_layer(), SLIDING, LINEAR)
    part, rest = whole.with_kv_heads(1), whole.with_kv_heads(3)
    assert [x.group for x in part.layers[:2]] == [2, 2]
    state = 2000
    assert part.kv_bytes(500) + rest.kv_bytes(500) == whole.kv_bytes(500) + state
    assert part.layers[0].qkv_params + rest.layers[0].qkv_params == whole.layers[0].qkv_params
    assert part.layers[2] == whole.layers[2]
    assert whole.with_kv_heads(4) == whole
    with pytest.raises(ValueError, match="kv_heads=5 is not within 1 and the 4 KV heads of 'toy'"):
        whole.with_kv_heads(5)


def test_shapes_are_values() -> None:
    assert {model(dense_layer()): 1}[model(dense_layer())] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dense"}, "unknown layer kind 'dense'; known: full, sliding, mla, linear"),
        ({"kv_heads": 3}, "heads=8 is not a multiple of kv_heads=3"),
        ({"head_dim": 0}, "head_dim=0 must be at least 1"),
        ({"window_tokens": 8}, "window_tokens=8 in a full layer; sliding, core and compressed layers alone have it"),
        ({"kind": "sliding"}, "window_tokens=0 in a sliding layer"),
        ({"experts_per_token": 2}, "experts_per_token=2 is not within 0 and experts=0"),
    ],
)
def test_contradictory_layers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_layer(**changes)


def test_models_refuse_unknown_types_and_no_layers() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'bf15'"):
        model(dense_layer(), kv_dtype="bf15")
    with pytest.raises(ValueError, match="model 'toy' has no layers"):
        model()
    with pytest.raises(ValueError, match="tokens=-1 must be 0 or more"):
        model(dense_layer()).kv_bytes(-1)
