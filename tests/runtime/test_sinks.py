"""Policies keep attention sinks: a model in which one is planted predicts with them as with full attention."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import parse_policy  # noqa: E402
from runtime.quality import Passages, full_logits, measure  # noqa: E402

HIDDEN, HEADS, DIM, CONTEXT, NEW = 64, 4, 16, 400, 12
SINK, OPPOSED = 0, 1  # token ids
UNIT = HIDDEN**0.5  # a token that lies along one coordinate has this there after its norm


@pytest.fixture(scope="module")
def model():
    """Every query looks at token SINK, whose value is nothing; whatever else is attended to says one thing, loudly.

    The keys of OPPOSED lie against the queries as SINK's does along them, so that seven of them beside it hide it from
    whoever judges keys by their mean. Both tokens have a coordinate of the residual stream to themselves.
    """
    torch.manual_seed(7)
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=1024, rope_theta=1e8, pad_token_id=None, bos_token_id=SINK,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    own = [SINK, OPPOSED]
    slow = DIM // 2 - 1  # the dimension of a head that turns least with the position
    with torch.no_grad():
        model.model.embed_tokens.weight[:, own] = 0
        model.model.embed_tokens.weight[own] = 0
        model.model.embed_tokens.weight[own, own] = 100.0
        for layer in model.model.layers:
            attention = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(attention, name).weight[:, own] = 0
            layer.mlp.gate_proj.weight[:, own] = 0
            attention.o_proj.weight[own] = 0
            layer.mlp.down_proj.weight[own] = 0
            attention.q_proj.bias.unflatten(0, (-1, DIM))[:, slow] = 1
            keys = attention.k_proj.weight.unflatten(0, (-1, DIM))
            keys[:, slow, SINK], keys[:, slow, OPPOSED] = 72 / UNIT, -72 / 7 / UNIT  # a logit of 72 / sqrt(16) = 18
            attention.v_proj.bias.fill_(1)
            attention.v_proj.weight[:, SINK] = -1 / UNIT
            attention.o_proj.weight.mul_(20)
        model.model.norm.weight.fill_(12)
    return model


@pytest.fixture(scope="module")
def asked():
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(2, 64, (2, CONTEXT + NEW), generator=generator)
    ids[:, 0], ids[:, 1:8] = SINK, OPPOSED
    return Passages(ids=ids, context_tokens=CONTEXT, new_tokens=NEW)


@pytest.fixture(scope="module")
def full(model, asked):
    return full_logits(model, asked)


def divergence(model, policy, asked, full):
    return max(measure(model, parse_policy(policy), asked, full).kl_nats)


# A budget that leaves most of the context out, and what a policy needs to begin at 400 tokens.
POLICIES = [
    "sink-window:window_tokens=48,positions=original",
    "snapkv:budget_tokens=48,observation_tokens=8",
    "quest:budget_tokens=48,page_tokens=8,dense_layers=0",
    "infllm:sink_tokens=8,window_tokens=64,block_tokens=16,top_k=2,cache_blocks=4,execution_tokens=64",
    "squeezed-attention:observation_tokens=16,keep=0.05",
    "squeezed-attention:observation_tokens=16,budget_tokens=16,tier=ddr",
    "shadowkv:budget_tokens=32,rank=8,outlier_chunks=0",
    "retrieval-attention:sink_tokens=4,window_tokens=32,top_k=8,index=ivf,lists=8",
    "retroinfer:window_tokens=32,update_tokens=64,retrieval=0.05,estimation=0",
]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sink_is_kept(policy, model, asked, full):
    assert divergence(model, policy, asked, full) < 0.02


@pytest.mark.parametrize(
    "policy",
    [
        "sink-window:window_tokens=48,positions=original,sink_tokens=0",
        "shadowkv:budget_tokens=32,rank=8,outlier_chunks=0,sink_tokens=0",
    ],
)
def test_a_policy_that_drops_it_is_caught(policy, model, asked, full):
    assert divergence(model, policy, asked, full) > 0.3
