"""needle-28m with an attention sink: policies that keep its first token still answer, those that drop it do not.

Trained models rest their idle heads on the first token, whose value is nothing. needle-28m was trained without need of
that, so each layer is given a KV head that rests: two query heads of which every query looks for the same, white keys
made of the layer's own hidden states, and values that say one thing, loudly. Its own heads are as they were.
"""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import parse_policy  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.needle import expand, load_evals  # noqa: E402

DIM, SLOW, GROUP = 64, 7, 2  # of a head; the pairs of dimensions that hardly turn within a few thousand tokens
LOGIT, SPREAD, NORM = 20.0, 2.5, 10.0  # of the sink for every query, of other keys' logits, of the sink's key
LOUD = 0.6
TOKENS = 700  # of each example's end


@pytest.fixture(scope="module")
def needle(tmp_path_factory):
    folder = expand(tmp_path_factory.mktemp("needle") / "model")
    return folder, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def example():
    """A needle that a window of 560 tokens holds, far from sinks and question."""
    (found, *_) = (e for e in load_evals(("niah_multikey",), max_tokens=2048) if e.depth == 0.75)
    return found._replace(prompt=found.prompt[-TOKENS:])


@pytest.fixture(scope="module")
def resting(needle, example):
    """The model with a resting head in each layer, and the ids of its sink, of what is against it, and of nothing.

    Three more coordinates of the residual stream are those of the three new tokens alone, and so large there that no
    layer changes them.
    """
    folder, old = needle
    width, wide = old.config.hidden_size, old.config.hidden_size + 3
    config = transformers.AutoConfig.from_pretrained(
        folder,
        hidden_size=wide,
        num_attention_heads=old.config.num_attention_heads + GROUP,
        num_key_value_heads=old.config.num_key_value_heads + 1,
        vocab_size=old.config.vocab_size + 3,
        rms_norm_eps=old.config.rms_norm_eps * width / wide,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        hidden = old.model(torch.from_numpy(example.prompt)[None], output_hidden_states=True).hidden_states
        given = dict(old.named_parameters())
        for name, kept in model.named_parameters():
            before = given["model.embed_tokens.weight" if name == "lm_head.weight" else name]
            kept.zero_()
            kept[tuple(slice(size) for size in before.shape)] = before
            if "norm" in name:  # the mean of squares is taken over more coordinates
                kept.mul_((width / wide) ** 0.5)[width:] = 1
        new = torch.arange(3)
        model.model.embed_tokens.weight[old.config.vocab_size + new, width + new] = 1000
        for layer, was, states in zip(model.model.layers, old.model.layers, hidden, strict=False):
            add_resting_head(layer.self_attn, was.input_layernorm(states)[0], width, generator)
    return model, (old.config.vocab_size + new).tolist()


def add_resting_head(attention, states, width, generator):
    """Write the last KV head: what it reads of `states` (tokens, width), the normed input, has no direction."""
    unit = attention.q_proj.in_features**0.5  # what the norm makes of a token with one coordinate
    along = torch.zeros(2, DIM // 2)
    along[:, -SLOW:] = 1
    along = along.flatten() / along.norm()
    mean = states.mean(0)
    _, scales, axes = torch.linalg.svd(states - mean, full_matrices=False)
    turned = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0]
    keys = turned @ (axes[:DIM] / scales[:DIM, None]) * len(states) ** 0.5
    other = torch.randn(DIM, generator=generator).masked_fill(along > 0, 0)
    query = DIM**0.5 * (along * LOGIT / NORM + other / other.norm() * SPREAD)
    value = torch.randn(DIM, generator=generator)

    for linear, rows, heads in (
        (attention.q_proj, query, GROUP),
        (attention.k_proj, -keys @ mean, 1),
        (attention.v_proj, value, 1),
    ):
        own = torch.zeros(linear.out_features - heads * DIM)
        linear.bias = torch.nn.Parameter(torch.cat([own, *[rows] * heads]))
    attention.k_proj.weight[-DIM:, :width] = keys
    for column, key in enumerate((NORM * along, -NORM / 6 * along, torch.zeros(DIM))):
        attention.k_proj.weight[-DIM:, width + column] = (key + keys @ mean) / unit
    attention.v_proj.weight[-DIM:, width] = -value / unit
    attention.o_proj.weight[:width, -GROUP * DIM :] = LOUD * torch.randn(width, GROUP * DIM, generator=generator)


def answered(model, ids, example, policy="full"):
    new = len(example.answer)
    ids = torch.tensor(ids)[None]
    with torch.no_grad(), offload(model, parse_policy(policy), max_new_tokens=new) as kv:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=kv.cache(), max_new_tokens=new,
            min_new_tokens=new, do_sample=False, pad_token_id=2,
        )  # fmt: skip
    return example.correct(out[0, ids.shape[1] :].numpy())


@pytest.fixture(scope="module")
def prompt(resting, example):
    """The sink, what hides it from whoever judges a chunk by its mean, and a page's rest."""
    sink, against, nothing = resting[1]
    return [sink, *[against] * 7, *[nothing] * 8, *example.prompt.tolist()]


def test_the_model_answers_with_its_sink_as_it_did_before_and_not_without(needle, resting, example, prompt):
    assert answered(needle[1], example.prompt.tolist(), example)
    model, (_, _, nothing) = resting
    assert answered(model, prompt, example)
    assert not answered(model, [nothing, *prompt[1:]], example)


@pytest.mark.parametrize(
    "policy",
    [
        "sink-window:window_tokens=560",
        "quest:budget_tokens=128",
        "squeezed-attention",
        "shadowkv:budget_tokens=128,outlier_chunks=0",
        "retroinfer:update_tokens=64",
    ],
)
def test_policies_answer_because_they_keep_it(policy, resting, example, prompt):
    model, _ = resting
    assert answered(model, prompt, example, policy)
    bare = policy + ("," if ":" in policy else ":") + "sink_tokens=0"
    assert not answered(model, prompt, example, bare)


def test_retrieval_finds_the_sink_where_it_does_not_keep_it(resting, example, prompt):
    assert answered(resting[0], prompt, example, "retrieval-attention:index=flat,sink_tokens=0,window_tokens=128")
