"""Vision-language models: the language model follows the policy, the tower that sees stays as it is."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import parse_policy  # noqa: E402
from runtime import offload  # noqa: E402

TEXT = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
IMAGE, PATCHES, NEW = 99, 16, 8


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    return model, {"pixel_values": pixels}, PATCHES


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        image_token_id=IMAGE,
        vision_start_token_id=97,
        vision_end_token_id=98,
        video_token_id=96,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    grid = torch.tensor([[1, 8, 8], [1, 8, 8]])
    pixels = torch.randn(128, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(4))
    return model, {"pixel_values": pixels, "image_grid_thw": grid}, PATCHES


@pytest.fixture(scope="module", params=[llava, qwen2_vl])
def seen(request):
    """A model and two prompts of 13 words and an image each, the second one padded."""
    torch.manual_seed(1)
    model, images, patches = request.param()
    words = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([words[:, :4], torch.full((2, patches), IMAGE), words[:, 4:]], dim=1)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask, **images}
    if "image_grid_thw" in images:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return model.eval().float(), inputs


def generate(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)


def features(model, inputs):
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    with torch.no_grad():
        out = model.get_image_features(**given)
    out = getattr(out, "pooler_output", out)
    return torch.cat([part.flatten() for part in out]) if isinstance(out, tuple | list) else out.flatten()


@pytest.mark.parametrize(
    "policy",
    [
        *("full", "offload-all", "quest:budget_tokens=64", "snapkv:budget_tokens=29,observation_tokens=8"),
        "sink-window:positions=original",
        "squeezed-attention:keep=1,observation_tokens=4,centroid_share=0.2",
        "retrieval-attention:sink_tokens=2,window_tokens=8,top_k=19,index=flat",
        "retroinfer:window_tokens=4,cluster_tokens=4,update_tokens=8,retrieval=1,estimation=0",
    ],
)
def test_tokens_of_stock_with_images(seen, policy):
    model, inputs = seen
    expected = generate(model, inputs)
    with offload(model, parse_policy(policy), max_new_tokens=16) as kv:
        assert torch.equal(generate(model, inputs, past_key_values=kv.cache()), expected)


def test_the_tower_keeps_its_attention(seen):
    model, inputs = seen
    before = features(model, inputs)
    implementations = [model.config._attn_implementation, model.config.vision_config._attn_implementation]
    with offload(model, parse_policy("offload-all"), max_new_tokens=16):
        assert torch.equal(features(model, inputs), before)
        assert model.config.vision_config._attn_implementation == implementations[1]
        assert model.config.text_config._attn_implementation == "kvsim_tiers"
    assert [model.config._attn_implementation, model.config.vision_config._attn_implementation] == implementations
    assert model.config.text_config._attn_implementation == implementations[1]


def test_attention_in_both_directions_stays_so():
    """An encoder under our attention function, with and without padding, against its own."""
    from runtime.attention import NAME

    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    with offload(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), parse_policy("full")):
        pass  # which registers the function
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    for given in (torch.ones_like(ids), mask):
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            expected = model(ids, attention_mask=given).last_hidden_state
            model.set_attn_implementation(NAME)
            got = model(ids, attention_mask=given).last_hidden_state
        kept = given.bool()
        torch.testing.assert_close(got[kept], expected[kept], atol=1e-5, rtol=0)
