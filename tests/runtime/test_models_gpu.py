"""On a GPU a model shows what it shows on a CPU, and a saved cache goes on as the one that was saved."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import tiny_model  # noqa: E402

from policies import parse_policy  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.loading import load_model  # noqa: E402
from runtime.probe import probe  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PREFIX, TURN, NEW = 700, 5, 12
# Rotations by halves and by pairs, of a part of a head and of none; windows, sinks, an MLA latent, complex angles,
# ALiBi, a state beside keys and values.
FAMILIES = [
    *("llama", "qwen2", "qwen3", "gemma3_text", "gpt_oss", "glm", "cohere", "phi", "gpt_neox", "gpt2", "deepseek_v3"),
    *("llama4_text", "bloom", "lfm2", "falcon_h1", "cpmant"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_sees_the_same_layers(family: str) -> None:
    expected = probe(tiny_model(family))
    assert probe(tiny_model(family).cuda()) == expected


@pytest.mark.parametrize(
    "policy",
    [
        *("full", "offload-all", "sink-window:window_tokens=64,positions=original"),
        *("snapkv:budget_tokens=128", "quest:budget_tokens=128,dense_layers=0"),
        "infllm:window_tokens=128,sink_tokens=16,block_tokens=32,top_k=4,cache_blocks=6,execution_tokens=128",
        *("squeezed-attention:keep=0.1", "squeezed-attention:budget_tokens=64,tier=ddr"),
        "shadowkv:budget_tokens=128,rank=8,outlier_chunks=6",
        *(
            f"retrieval-attention:sink_tokens=16,window_tokens=84,top_k=32,{index}"
            for index in ("index=flat", "index=ivf,lists=24", "scanned=0.2,scan_factor=1")
        ),
        "retroinfer:update_tokens=16,retrieval=0.1",
    ],
)
def test_a_saved_cache_goes_on_as_the_original_does(tiny_llama: Path, tmp_path: Path, policy: str) -> None:
    """The same bits where they were, no token of the prefix read again, and the same tokens."""
    model, path = load_model(tiny_llama, "cuda", "fp32"), tmp_path / "prefix.safetensors"
    ids = torch.randint(3, 8192, (2, PREFIX + TURN), generator=torch.Generator().manual_seed(7)).cuda()
    with offload(model, parse_policy(policy), max_new_tokens=TURN + NEW) as kv:
        cache = kv.cache()
        with torch.no_grad():
            model(input_ids=ids[:, :PREFIX], past_key_values=cache)
        kv.save(cache, path)
        before = [{name: tensor.clone() for name, tensor in cache.arena.kept(i).items()} for i in range(3)]
        expected = go_on(model, cache, ids)
    with offload(model, parse_policy(policy), max_new_tokens=TURN + NEW) as kv:
        loaded = kv.load(path)
        for index, kept in enumerate(before):
            restored = loaded.arena.kept(index)
            assert restored.keys() == kept.keys()
            for name, tensor in kept.items():
                assert torch.equal(restored[name], tensor)
                assert restored[name].device == tensor.device
        assert torch.equal(go_on(model, loaded, ids), expected)
        assert kv.counts.steps[:, -1].max() <= TURN


def test_a_cache_saved_on_a_gpu_goes_on_on_a_cpu(tiny_llama: Path, tmp_path: Path) -> None:
    """The file names no device: the weights are the same, and what they predict is, but for roundings."""
    path, policy = tmp_path / "prefix.safetensors", parse_policy("offload-all")
    ids = torch.randint(3, 8192, (1, PREFIX + TURN), generator=torch.Generator().manual_seed(8))
    predicted = []
    for device in ("cuda", "cpu"):
        model = load_model(tiny_llama, device, "fp32")
        there = ids.to(device)
        with offload(model, policy, max_new_tokens=TURN) as kv, torch.no_grad():
            if device == "cuda":
                cache = kv.cache()
                model(input_ids=there[:, :PREFIX], past_key_values=cache)
                kv.save(cache, path)
            else:
                cache = kv.load(path)
            predicted.append(model(input_ids=there[:, PREFIX:], past_key_values=cache).logits.cpu())
    torch.testing.assert_close(*predicted, atol=1e-4, rtol=0)


def go_on(model, cache, ids):
    """What is generated behind all ids, of which the cache has some."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)[:, -NEW:]
