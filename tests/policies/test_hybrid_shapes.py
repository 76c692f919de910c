"""Architectures that cache less by design: their rows, bytes and FLOPs against counts by hand and published sizes."""

import pytest

from kvsim.models import load_model, model_source
from policies import ModelShape, Step, hf, parse_policy, plan_layer
from policies.model import LayerShape
from policies.plan import Tier, flops, stored_bytes

CONTEXT = 131_072
GIB = 2**30
KV_ROW = 2 * 16 * 128 * 2  # bytes of a row of K and V of masformer-1.3b and block-transformer-1.2b


def planned(model: ModelShape, step: Step, layer: int = 0):
    return plan_layer(parse_policy("full"), model, step, layer)


def work(model: ModelShape, step: Step, layer: int = 0) -> int:
    return flops(planned(model, step, layer).ops, {})


def core_rows(tokens: int, window: int, group: int) -> int:
    """Rows of a core layer, token by token: whatever leaves the window waits until its group is complete."""
    waiting = cores = 0
    for _ in range(max(0, tokens - window)):
        waiting += 1
        if waiting == group:
            waiting, cores = 0, cores + 1
    return min(tokens, window) + waiting + cores


@pytest.mark.parametrize(
    ("name", "published_gib"),
    [("llama-2-7b", 128), ("mistral-7b-v0.2", 32), ("mixtral-8x7b", 32), ("jamba-1.5-mini", 4)],
)
def test_caches_of_256k_tokens_as_jamba_s_paper_lists_them(name: str, published_gib: int) -> None:
    """Jamba, arXiv:2403.19887, table 1, at 16 bits; its states, which the table leaves out, are another 8 MiB."""
    model = load_model(name)
    assert model.kv_bytes_per_token * 262_144 == published_gib * GIB
    states = model.kv_bytes(262_144) - published_gib * GIB
    assert states == (28 * 8192 * 19 * 2 if name == "jamba-1.5-mini" else 0)


def test_nemotron_h_by_hand() -> None:
    """52 blocks are 28 mixers, 24 of which an MLP follows; each Mamba-2 keeps 128 heads x 64 x 128 and 3 inputs."""
    model = load_model("nemotron-h-8b")
    assert "".join(x.kind[0] for x in model.layers) == "llll" + 4 * ("f" + "lllll")
    assert sum(x.mlp_params > 0 for x in model.layers) == 24
    convolved = 128 * 64 + 2 * 8 * 128
    state = 128 * 64 * 128 + 3 * convolved
    assert model.kv_bytes(CONTEXT) == 24 * state * 2 + 4 * 2 * 8 * 128 * 2 * CONTEXT
    mamba = 4096 * (8192 + convolved + 128) + 5 * convolved + 3 * 128 + 8192 + 8192 * 4096 + 4096
    attention = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 4096
    mlp = 2 * 4096 * 21504 + 4096
    assert model.params == 24 * mamba + 4 * attention + 24 * mlp + 2 * 131_072 * 4096 + 4096


def test_experts_of_nemotron_3_nano() -> None:
    """The model card: 31.6 B weights, 3.2 B of them active, 3.6 B with the embedding."""
    model = load_model("nemotron-3-nano-30b-a3b")
    assert model.active_params == pytest.approx(3.2e9, rel=0.02)
    assert model.active_params + model.embedding_params == pytest.approx(3.6e9, rel=0.02)
    assert model.kv_bytes_per_token == 6 * 2 * 2 * 128 * 2


def test_masformer_attends_fully_in_four_layers() -> None:
    model = load_model("masformer-1.3b")
    assert model.kv_bytes(CONTEXT) == (4 * CONTEXT + 20 * 1024) * KV_ROW
    # Its up to 75 % less attention at 8K: a block of 1,024 tokens sees no other, so has an eighth of all pairs.
    dense, local = 8192 * 8193 // 2, 8 * (1024 * 1025 // 2)
    assert 1 - (4 * dense + 20 * local) / (24 * dense) == pytest.approx(0.75, abs=0.03)
    step = Step(prompt_tokens=8192, past_tokens=0, new_tokens=8192)
    assert work(model, step) == 4 * 16 * 128 * dense


def test_cca_caches_what_its_paper_says() -> None:
    """arXiv:2412.12465: a cache 93 % smaller than full attention's at 128K, for groups of 16 and a window of 1,024."""
    pooled, dense = load_model("cca-7b"), load_model("llama-2-7b")
    assert 1 - pooled.kv_bytes(CONTEXT) / dense.kv_bytes(CONTEXT) == pytest.approx(0.93, abs=0.001)
    assert pooled.kv_bytes_per_token * 16 == dense.kv_bytes_per_token
    for tokens in (1, 1024, 1039, 1040, 5000):
        assert pooled.layers[0].kv_bytes(tokens, "fp16", "fp16") == core_rows(tokens, 1024, 16) * 2 * 32 * 128 * 2


@pytest.mark.parametrize(("past", "new"), [(0, 1), (0, 700), (63, 1), (64, 40), (200, 300)])
def test_a_core_layer_attends_to_its_rows(past: int, new: int) -> None:
    layer = LayerShape(
        kind="core", heads=2, kv_heads=2, head_dim=4, v_head_dim=4, window_tokens=40, block_tokens=8,
        qkv_params=1, out_params=1, mlp_params=1, mlp_active_params=1,
    )  # fmt: skip
    model = ModelShape(
        name="m", hidden_dim=8, vocab_size=8, max_positions=8, layers=(layer,), embedding_params=1, head_params=1,
        params=5,
    )  # fmt: skip
    pairs = sum(core_rows(tokens, 40, 8) for tokens in range(past + 1, past + new + 1))
    closed = (max(0, past + new - 40) // 8 - max(0, past - 40) // 8) * 8  # tokens that are pooled in this step
    step = Step(prompt_tokens=past + new, past_tokens=past, new_tokens=new)
    assert work(model, step) == 2 * 2 * 8 * (pairs + closed)


def test_a_block_transformer_works_once_a_block() -> None:
    """Block layers hold a row for 4 tokens, and do nothing but where a block begins; the others see 4 + 2 rows."""
    model = load_model("block-transformer-1.2b")
    assert model.kv_bytes(CONTEXT) == 12 * (CONTEXT // 4) * KV_ROW + 12 * 6 * KV_ROW
    assert model.kv_bytes_per_token == 12 * KV_ROW // 4
    steps = [Step.decoding(2001, g) for g in range(1, 9)]
    begins = [step.past_tokens % 4 == 0 for step in steps]
    assert begins.count(True) == 2
    for step, begun in zip(steps, begins, strict=True):
        plan = planned(model, step)
        blocks = -(-step.tokens // 4)
        assert stored_bytes([plan.buffers])[Tier.HBM] == blocks * KV_ROW
        assert flops(plan.ops, {}) == (4 * 16 * 128 * blocks if begun else 0)
        assert work(model, step, 12) == 4 * 16 * 128 * 6
    prompt = Step(prompt_tokens=2001, past_tokens=0, new_tokens=2001)
    assert work(model, prompt) == 4 * 16 * 128 * (501 * 502 // 2)
    # A quarter of the lower layers' weights, on average, are multiplied by a token.
    layer = 4 * 2048 * 2048 + 2 * 2048 * 8192
    assert model.active_params == pytest.approx(12 * layer * 1.25 + 50_304 * 2048, rel=0.001)


def test_a_block_layer_s_weights_are_read_by_the_sequences_that_begin_a_block() -> None:
    layer = load_model("block-transformer-1.2b").layers[0]
    assert [layer.share_run(n) for n in (0, 1, 2)] == [0, 0.25, pytest.approx(1 - 0.75**2)]
    assert load_model("masformer-1.3b").layers[0].share_run(1) == 1


@pytest.mark.parametrize("name", ["cca-7b", "block-transformer-1.2b"])
@pytest.mark.parametrize("policy", ["quest", "shadowkv", "offload-all", "sink-window"])
def test_policies_that_need_every_token_are_refused(name: str, policy: str) -> None:
    step = Step(prompt_tokens=9000, past_tokens=0, new_tokens=9000)
    with pytest.raises(
        ValueError, match=r"needs a key of every token, but layer 0 of .* caches one row for .*use full"
    ):
        plan_layer(parse_policy(policy), load_model(name), step, 0)


@pytest.mark.parametrize("name", ["masformer-1.3b", "cca-7b", "block-transformer-1.2b"])
def test_sources_say_what_was_trained(name: str) -> None:
    assert any(word in model_source(name) for word in ("trained", "fine-tuned"))
    assert model_source("./config.json") == ""


def test_nemotron_s_experts_in_a_latent_by_hand() -> None:
    config = {
        "model_type": "nemotron_h", "hidden_size": 8, "vocab_size": 8, "num_attention_heads": 2, "head_dim": 4,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "hybrid_override_pattern": "*E",
        "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 5, "moe_latent_size": 4,
        "moe_shared_expert_intermediate_size": 10,
    }  # fmt: skip
    layer = hf.read(config, "m").layers[0]
    assert layer.expert_params == 2 * 4 * 5  # two matrices between the latent and the expert
    around = 2 * 8 * 4 + 2 * 8 * 10 + 6 * 8 + 6 + 8  # into the latent and back, shared expert, router, its bias, norm
    assert layer.mlp_params == 6 * 2 * 4 * 5 + around


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": "M-X"}, r"has 'X'; known: M \(mamba\), \* \(attention\), - \(mlp\), E \(moe\)"),
        ({"hybrid_override_pattern": "M--*"}, "has an MLP that follows no mixer"),
        ({"hybrid_override_pattern": "-M"}, "has an MLP that follows no mixer"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3 differs from the 2 blocks"),
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern=None must be text"),
        ({"layers_block_type": ["mamba", "hyena"]}, "layers_block_type=.*has 'hyena'; known: mamba"),
    ],
)
def test_errors_of_nemotron_configs_name_the_key(changes: dict[str, object], message: str) -> None:
    config = {
        "model_type": "nemotron_h", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "mamba_num_heads": 2, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4,
        "conv_kernel": 4, "max_position_embeddings": 64, "hybrid_override_pattern": "M-",
    }  # fmt: skip
    assert [x.mlp_params for x in hf.read(config, "m").layers] == [2 * 8 * 8 + 8]
    with pytest.raises(ValueError, match=message):
        hf.read({**config, **changes}, "m")
