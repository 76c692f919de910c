"""Catalogue models: published parameter counts, cached bytes by hand, and how models are found."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from kvsim.models import load_model, model_names

CONFIGS = files("kvsim") / "catalogue" / "models"


@pytest.mark.parametrize("name", model_names())
def test_params_are_within_half_a_percent_of_the_published(name: str) -> None:
    # Each file states the published count and, in `_source`, where it was published; a count that was printed with two
    # or three digits holds to half of the last one, `_published_to`.
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    assert "parameter count" in config["_source"]
    published = config["_published_params"]
    assert load_model(name).params == pytest.approx(published, abs=config.get("_published_to", 0.005 * published))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-2-7b", 32 * 2 * 32 * 128 * 2),  # layers x (K and V) x KV heads x head_dim x bytes
        ("llama-3.1-8b", 131_072),
        ("llama-3-70b", 327_680),  # Mooncake (FAST'25)
        ("yi-34b-200k", 245_760),  # arXiv 2405.08944
        ("qwen3-30b-a3b", 48 * 2 * 4 * 128 * 2),
        ("glm-4-9b-1m", 40 * 2 * 4 * 128 * 2),
        ("deepseek-v3", 61 * (512 + 64) * 2),  # the latent and the rotary key
        ("command-r", 40 * 2 * 64 * 128 * 2),
        ("gpt-oss-20b", 12 * 2 * 8 * 64 * 2),  # every second of 24 layers is full
        ("gemma-3-27b", 10 * 2 * 16 * 128 * 2),  # every sixth of 62
        ("jamba-1.5-mini", 4 * 2 * 8 * 128 * 2),  # one in eight of 32
        ("qwen3-next-80b-a3b", 12 * 2 * 2 * 256 * 2),  # every fourth of 48
        ("mistral-7b-v0.1", 0),  # all windows
        ("needle-28m", 8 * 2 * 4 * 64 * 2),
    ],
)
def test_kv_bytes_per_token(name: str, expected: int) -> None:
    assert load_model(name).kv_bytes_per_token == expected


def test_windows_cap_the_cache() -> None:
    gemma, tokens = load_model("gemma-3-12b"), 131_072
    per_layer = 2 * 8 * 256 * 2
    assert gemma.kv_bytes(tokens) == (8 * tokens + 40 * 1024) * per_layer
    oss = load_model("gpt-oss-120b")
    assert [(x.kind, x.window_tokens) for x in oss.layers[:2]] == [("sliding", 128), ("full", 0)]
    assert oss.kv_bytes(1000) == (18 * 1000 + 18 * 128) * 2 * 8 * 64 * 2
    assert load_model("mistral-7b-v0.1").kv_bytes(tokens) == 4096 * 131_072


def test_longgen_caches_what_its_paper_says() -> None:
    hybrid, dense = load_model("longgen-7b"), load_model("llama-2-7b")
    assert hybrid.kv_bytes(131_072) == (12 * 131_072 + 20 * 1024) * 2 * 32 * 128 * 2
    # arXiv:2410.01485: 62 % less than full attention when it serves 128K.
    assert 1 - hybrid.kv_bytes(131_072) / dense.kv_bytes(131_072) == pytest.approx(0.62, abs=0.005)
    assert hybrid.params == dense.params


def test_states_are_constant() -> None:
    jamba = load_model("jamba-1.5-mini")
    assert [i for i, x in enumerate(jamba.layers) if x.kind == "full"] == [4, 12, 20, 28]
    # Each of 28 layers keeps 8,192 channels x (16 of state + 3 inputs of the convolution), in bf16.
    assert jamba.kv_bytes(0) == 28 * 8192 * 19 * 2
    qwen = load_model("qwen3-next-80b-a3b")
    # Each of 36 layers keeps a 128 x 128 matrix for 32 heads, and 3 inputs of a convolution over 8,192 channels.
    assert qwen.kv_bytes(0) == 36 * (32 * 128 * 128 + 3 * 8192) * 2


@pytest.mark.parametrize(
    ("name", "published", "embedding_counted"),
    [
        ("mixtral-8x7b", 12.9e9, True),  # Mixtral of Experts (arXiv 2401.04088): 13B, 12.9B on the announcement
        ("mixtral-8x22b", 39e9, True),  # announcement of Mixtral 8x22B
        ("qwen3-30b-a3b", 3.3e9, True),  # model card
        ("qwen3-235b-a22b", 22e9, True),  # model card
        ("gpt-oss-20b", 3.61e9, False),  # model card (arXiv 2508.10925), table 1: unembedding counted, embedding not
        ("gpt-oss-120b", 5.13e9, False),
        ("deepseek-v3", 37e9, True),  # arXiv 2412.19437
        ("jamba-1.5-mini", 12e9, True),  # arXiv 2408.12570
    ],
)
def test_active_params(name: str, published: float, embedding_counted: bool) -> None:
    model = load_model(name)
    active = model.active_params + (model.embedding_params if embedding_counted else 0)
    assert active == pytest.approx(published, rel=0.02)


def test_checkpoint_sizes_of_quantised_models() -> None:
    # gpt-oss model card, table 1: 12.8 and 60.8 GiB; DeepSeek-V3 is trained and published in fp8.
    assert load_model("gpt-oss-20b").weight_bytes == pytest.approx(12.8 * 2**30, rel=0.005)
    assert load_model("gpt-oss-120b").weight_bytes == pytest.approx(60.8 * 2**30, rel=0.005)
    deepseek = load_model("deepseek-v3")
    # Its checkpoint has one layer more, for multi-token prediction, with an embedding, a head, and a projection of
    # twice the hidden size of its own: 688,586,727,753 bytes of files.
    further = deepseek.layer_bytes_touched(deepseek.layers[-1], 100_000) + 2 * (2 * 129280 * 7168 + 2 * 7168**2)
    assert deepseek.weight_bytes + further == pytest.approx(688_586_727_753, rel=5e-5)


def test_yi_34b_weighs_what_the_paper_says() -> None:
    assert load_model("yi-34b-200k").weight_bytes == pytest.approx(68e9, rel=0.02)  # arXiv 2405.08944


def test_attention_that_tensor_parallelism_replicates() -> None:
    whole = load_model("llama-3.1-8b")
    assert whole.shard(8).kv_bytes_per_token * 8 == whole.kv_bytes_per_token
    assert whole.shard(16).kv_bytes_per_token * 16 == 2 * whole.kv_bytes_per_token
    latent = load_model("deepseek-v3")
    assert latent.shard(8).kv_bytes_per_token == latent.kv_bytes_per_token


def test_models_from_files(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text((CONFIGS / "llama-3.1-8b.json").read_text())
    assert load_model(str(folder)).name == "my-model"
    assert load_model(str(folder / "config.json")).layers == load_model("llama-3.1-8b").layers


def test_unknown_names_list_the_nearest_first() -> None:
    with pytest.raises(
        ValueError, match=r"unknown model 'llama-3.1-8'; did you mean 'llama-3.1-8b'\? known: llama-3.1"
    ):
        load_model("llama-3.1-8")


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"bad\.json is not JSON: .* line 1 column 16"):
        load_model(str(path))
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"bad\.json holds a JSON list; a config\.json holds an object"):
        load_model(str(path))
    with pytest.raises(FileNotFoundError):
        load_model(str(tmp_path / "none.json"))


def test_down_projections_of_mla_are_whole_on_every_rank() -> None:
    """DeepSeek-V3: 7,168 to a latent of 512 + 64 and to a query of 1,536, with their norms; the rest goes by heads."""
    whole, rank = (model.layers[5] for model in (load_model("deepseek-v3"), load_model("deepseek-v3").shard(8)))
    down = 7168 * (512 + 64) + 512 + 7168 * 1536 + 1536
    up = 1536 * 128 * (128 + 64) + 512 * 128 * (128 + 128)
    assert whole.qkv_params == down + up + 7168
    assert rank.qkv_params == down + up // 8 + 7168 // 8
    assert rank.out_params == 128 * 128 * 7168 // 8


def test_a_model_of_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    model = tmp_path / "hub" / "models--nvidia--Llama-3.1-70B-Instruct-FP8"
    folder = model / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc\n")
    plain = json.loads((CONFIGS / "llama-3.1-70b.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain))
    scheme = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": scheme}))
    shape = load_model("nvidia/Llama-3.1-70B-Instruct-FP8")
    # Matrices in a byte each, with two fp32 scales; embedding, head and norms in two; a scale of keys, one of values.
    in_layers = 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    assert shape.weight_bytes == in_layers + 80 * (7 * 8 + 8) + 2 * (2 * 128256 * 8192 + 161 * 8192)
    assert shape.kv_bytes_per_token == 80 * 2 * 8 * 128
    assert load_model(str(folder)).weight_bytes == shape.weight_bytes
    with pytest.raises(ValueError, match="hf download nvidia/other"):
        load_model("nvidia/other")


@pytest.mark.parametrize(
    ("file", "scheme", "dtype"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "int4"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "int4"),
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "NVFP4"}}, "nvfp4"),
    ],
)
def test_schemes_beside_a_config(tmp_path: Path, file: str, scheme: dict[str, object], dtype: str) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / "llama-3.1-8b.json").read_text())
    (tmp_path / file).write_text(json.dumps(scheme))
    shape = load_model(str(tmp_path))
    assert (shape.weight_dtype, shape.stored_dtypes["mlp"]) == (dtype, dtype)
    assert shape.weight_bytes < 0.4 * load_model("llama-3.1-8b").weight_bytes
