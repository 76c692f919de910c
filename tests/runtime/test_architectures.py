"""Architectures are judged by what they do: a core of families, two more each day, and models on no list."""

import datetime as dt
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from exactness import EXACT, judge  # noqa: E402
from tiny_models import tiny_model  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaAttention  # noqa: E402

from policies import parse_policy  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.probe import probe  # noqa: E402
from runtime.rotary import UNROTATED, Rotation, angles_of, unrotate  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())
TAKEN = sorted(name for name, row in RESULTS["families"].items() if row.get("exact"))
CORE = ("gpt2", "cohere", "smollm3", "gemma3n_text", "falcon_h1", "mimo_v2_flash", "qwen2_5_vl", "bloom", "deepseek_v3")
DAY = dt.datetime.now(tz=dt.UTC).timetuple().tm_yday  # so that CI goes through all families in turn
TODAY = [TAKEN[(2 * DAY + i) % len(TAKEN)] for i in range(2)]


@pytest.mark.parametrize("family", sorted({*CORE, *TODAY}))
def test_a_family_is_as_exact_as_the_table_says(family):
    asked = ["full", "offload-all", "sink-window", "shadowkv"]
    verdict = judge(tiny_model(family), policies=asked, lossy=())
    assert not verdict.wrong
    assert verdict.exact == [name for name in asked if name in RESULTS["families"][family]["exact"]]


def test_the_page_is_made_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from architectures import page

    assert page(RESULTS) == (ROOT / "docs" / "measured" / "architectures.md").read_text()
    assert not [name for name, row in RESULTS["families"].items() if row.get("wrong")]
    assert len(TAKEN) > 150
    for name, row in RESULTS["families"].items():
        if "untried" not in row:  # every policy has an answer
            assert {*row["exact"], *row["refused"]} == {*EXACT}, name


@pytest.mark.parametrize(
    ("family", "policy", "says"),
    [
        ("bloom", "quest", "computes attention by itself, not through Transformers' attention interface; .*full, off"),
        ("diffllama", "quest", "attends to other values than it caches"),
        ("jetmoe", "quest", "changes keys between the cache and attention"),
        ("inkling_text", "quest", "gives attention position_bias"),
        ("deepseek_v3", "quest", "an MLA latent is expanded"),
        ("paligemma", "sink-window", "attends to tokens after its own"),
        ("hrm_text", "shadowkv", "needs keys before their rotation, and how layer 0 of hrm_text rotates them was not"),
        ("mamba", "full", "keeps a state of constant size"),
        ("glm_moe_dsa", "full", "keeps more than keys and values"),
        ("rwkv", "full", "hands no keys and values to the cache"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_is_generated(family, policy, says):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=says), offload(model, parse_policy(policy)):
        pass


# -- a decoder that nobody has named ---------------------------------------------------------------------------------

ALTERED = {"slope": 0.0}  # by which the attention below prefers near keys


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """As in any modeling file, with ALiBi's bias when `slope` says so."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling + ALTERED["slope"] * torch.arange(key.shape[2])
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class UnheardOfAttention(LlamaAttention):
    """Llama's, in a module of its own: the interface finds the function above as its eager one."""


class UnheardOfConfig(transformers.LlamaConfig):
    """An architecture that is on no list."""

    model_type = "unheard-of"


@pytest.fixture
def unheard_of(monkeypatch):
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaAttention", UnheardOfAttention)
    config = UnheardOfConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(config).eval().float()


def test_a_decoder_on_no_list_is_taken(unheard_of):
    verdict = judge(unheard_of, lossy=())
    assert not verdict.wrong
    assert not verdict.refused
    assert verdict.exact == list(EXACT)


def test_one_that_biases_its_scores_follows_no_policy_that_attends_for_it(unheard_of, monkeypatch):
    monkeypatch.setitem(ALTERED, "slope", 0.1)
    with (
        pytest.raises(ValueError, match="layer 0 attends in another way than softmax"),
        offload(unheard_of, parse_policy("quest")),
    ):
        pass
    verdict = judge(unheard_of, policies=["full", "offload-all"], lossy=())  # then it attends by itself
    assert verdict.exact == ["full", "offload-all"]


def test_the_model_is_left_as_it_was(unheard_of):
    before = unheard_of.config._attn_implementation
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    probe(unheard_of)
    assert unheard_of.config._attn_implementation == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in unheard_of.modules())


# -- rotations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rotation"),
    [
        ("llama", Rotation()),
        ("cohere", Rotation(pairs=True, table="interleaved")),
        ("glm4", Rotation(pairs=True)),  # half of each head
        ("gpt_oss", Rotation(table="half")),
        ("stablelm", Rotation()),  # a quarter of each head
        ("nanochat", Rotation(backwards=True)),
    ],
)
def test_keys_turned_back_are_those_that_the_projection_made(family, rotation):
    """What the probe has found, against the output of `k_proj`, which comes before the rotation."""
    model = tiny_model(family)
    found = [seen for seen in probe(model) if seen.kind == "full"][-1]
    assert found.rotation == rotation
    attention, heard = model.get_submodule(found.module), {}
    cache = transformers.DynamicCache(config=model.config)
    attention.k_proj.register_forward_hook(lambda _m, _a, out: heard.update(plain=out))
    attention.register_forward_pre_hook(lambda _m, _a, given: heard.update(given), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 10)[None], past_key_values=cache)
    kept = cache.layers[attention.layer_idx].keys
    cos, sin = rotation.full(*angles_of(heard["position_embeddings"]))
    plain = heard["plain"].unflatten(-1, (found.kv_heads, found.head_dim)).transpose(1, 2)
    back = unrotate(kept, cos[:, None], sin[:, None], pairs=rotation.pairs)
    if family == "nanochat":  # its norm without weights comes after the rotation, which keeps lengths
        plain = torch.nn.functional.rms_norm(plain, plain.shape[-1:], eps=model.config.rms_norm_eps)
    torch.testing.assert_close(back, plain, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "rotated"), [("smollm3", [True, False]), ("gpt2", [False] * 2), ("opt", [False] * 2)]
)
def test_layers_without_a_rotation_are_told_from_those_with_one(family, rotated):
    assert [seen.rotation != UNROTATED for seen in probe(tiny_model(family))] == rotated


def test_what_layers_hold_is_what_their_configs_say():
    layers = probe(tiny_model("gemma3n_text"))
    assert [layer.kind for layer in layers] == ["sliding", "full"] * 2
    assert [layer.shared for layer in layers if layer.kind == "full"] == [False, True]
    flash = [layer for layer in probe(tiny_model("mimo_v2_flash")) if layer.kind == "full"]
    assert {(layer.kv_heads, layer.head_dim, layer.v_head_dim) for layer in flash} == {(2, 16, 8)}
