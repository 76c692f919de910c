"""Models that come quantised: the runtime needs their KV shapes, whatever their weights were stored in."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from kvsim.__main__ import main  # noqa: E402
from policies import parse_policy  # noqa: E402
from runtime import loading, offload  # noqa: E402


def test_a_config_that_names_a_quantisation_is_no_hindrance(tiny_llama: Path) -> None:
    """Transformers leaves it in the config of a model that it has turned back, as from a GGUF file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    model.config.quantization_config = {"quant_method": "gguf"}
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=9, do_sample=False)
        with offload(model, parse_policy("offload-all"), max_new_tokens=9) as kv:
            assert torch.equal(
                model.generate(ids, past_key_values=kv.cache(), max_new_tokens=9, do_sample=False), expected
            )


POLICIES = [
    *("full", "offload-all", "snapkv:budget_tokens=4096"),
    "retrieval-attention:sink_tokens=2,window_tokens=8,top_k=30,index=flat",
]


class Int8Linear(torch.nn.Module):
    """A linear layer that holds bytes and a scale for each row, as quantisers put in a layer's place."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight_int8", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight_int8 * self.scale).T


@pytest.mark.parametrize("policy", POLICIES)
def test_layers_that_hold_no_floating_weights_are_taken(tiny_llama: Path, tmp_path: Path, policy: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        setattr(part, name, Int8Linear(linear))
    assert not [name for name, _ in model.named_parameters() if "_proj" in name]
    follow(model, policy, tmp_path)


def test_a_model_that_unpacks_its_weights_in_its_first_forward_is_taken(tiny_llama: Path, tmp_path: Path) -> None:
    """As compressed-tensors does, by a hook of the whole model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    projections = [layer.self_attn.q_proj for layer in model.model.layers]
    packed = [vars(linear)["_parameters"].pop("weight") for linear in projections]

    def unpack(_model, _args):
        for linear, weight in zip(projections, packed, strict=True):
            linear.weight = weight
        hook.remove()

    hook = model.register_forward_pre_hook(unpack)
    follow(model, POLICIES[1], tmp_path)


@pytest.mark.filterwarnings("default")  # what these libraries warn of at import is theirs
@pytest.mark.parametrize("method", ["torchao", "bitsandbytes", "optimum.quanto"])
def test_what_quantises_on_a_cpu_is_taken(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    """The libraries are no dependencies: each runs where it is installed."""
    pytest.importorskip(method)
    pytest.importorskip("accelerate")
    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        how = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif method == "bitsandbytes":
        how = transformers.BitsAndBytesConfig(load_in_8bit=True)  # 4 bits need rows of 64
    else:
        how = transformers.QuantoConfig(weights="int8")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=how, dtype=torch.float32, device_map="cpu"
    )
    assert model.is_quantized
    follow(model.eval(), POLICIES[1], tmp_path)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_four_bits_of_bitsandbytes_compute_after_a_cache_was_saved_as_before(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=how, dtype=torch.float32, device_map="cpu"
    ).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        follow(model, POLICIES[1], tmp_path)
        assert torch.equal(model(ids).logits, before)


def packed_words(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Eight numbers of 4 bits in an int32, along the last dimension."""
    words = sum(values[..., at::8].long() << (4 * place) for place, at in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def packed(weight: torch.Tensor, method: str) -> dict[str, torch.Tensor]:
    """A matrix as checkpoints of the method hold it: symmetric, one scale for 32 inputs or for a block."""
    if method == "fp8":
        scale = weight.abs().max() / 448
        return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale_inv": scale.reshape(1, 1)}
    outputs, inputs = weight.shape
    groups = weight.view(outputs, -1, 32)
    scales = (groups.abs().amax(2) / 7).clamp(min=1e-6)
    values = ((groups / scales[..., None]).round() + 8).clamp(0, 15).long().view(outputs, inputs).T
    zeros = torch.full((inputs // 32, outputs), 8)
    in_order, awq = tuple(range(8)), (0, 2, 4, 6, 1, 3, 5, 7)
    if method == "awq":
        words = {"qweight": packed_words(values, awq), "qzeros": packed_words(zeros, awq)}
    else:  # GPTQ packs along the inputs, and stores zero points less one
        words = {
            "qweight": packed_words(values.T, in_order).T,
            "qzeros": packed_words(zeros - 1, in_order),
            "g_idx": torch.arange(inputs, dtype=torch.int32) // 32,
        }
    return {**words, "scales": scales.T.half()}


CHECKPOINTS = {
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "gptq": {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "checkpoint_format": "gptq"},
    "awq": {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", CHECKPOINTS)
def test_a_quantised_checkpoint_is_taken(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    """Written here, matrix by matrix. Transformers turns FP8 back on a CPU; gptqmodel runs the others."""
    pytest.importorskip("accelerate")
    if method != "fp8":
        pytest.importorskip("gptqmodel")
        pytest.importorskip("optimum")
    folder = tmp_path / "checkpoint"
    config = transformers.AutoConfig.from_pretrained(tiny_llama, intermediate_size=64)  # whole groups
    torch.manual_seed(4)
    stock = transformers.AutoModelForCausalLM.from_config(config).eval()
    stock.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        parts = packed(weights.pop(name), method)
        weights |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in parts.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {"quant_method": method, **CHECKPOINTS[method]}
    (folder / "config.json").write_text(json.dumps(written))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        probable = [torch.log_softmax(each(ids).logits.float(), dim=-1) for each in (model, stock)]
    assert 0 < (probable[0] - probable[1]).abs().mean() < 0.2  # it is that model, rounded
    follow(model.eval(), POLICIES[1], tmp_path)


def follow(model, policy: str, tmp_path: Path) -> None:
    """The tokens of stock `generate`, from a policy that leaves nothing out, and from a cache that was saved."""
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    with torch.no_grad(), offload(model, parse_policy(policy), max_new_tokens=10) as kv:
        expected = model.generate(ids, pad_token_id=0, **options)
        assert torch.equal(model.generate(ids, pad_token_id=0, past_key_values=kv.cache(), **options), expected)
        cache = kv.cache()
        model(ids[:, :-1], past_key_values=cache)
        kv.save(cache, tmp_path / "prefix.safetensors")
        loaded = kv.load(tmp_path / "prefix.safetensors")
        assert torch.equal(model.generate(ids, pad_token_id=0, past_key_values=loaded, **options), expected)


def test_a_gguf_file_says_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("a b c")
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert main(["generate", "--model", str(folder), "--prompt-file", str(tmp_path / "prompt.txt")]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {folder / 'model.gguf'} needs gguf and accelerate to be read: pip install 'kvsim[real]'\n"
    (folder / "other.gguf").write_bytes(b"GGUF")  # which of them?
    assert main(["generate", "--model", str(folder), "--prompt-file", str(tmp_path / "prompt.txt")]) == 2
    assert "no folder with a config.json or one GGUF file" in capsys.readouterr().err
