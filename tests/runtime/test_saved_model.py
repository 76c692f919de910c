"""A saved cache belongs to everything that decides a model's keys and values, and to nothing else."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from policies import parse_policy  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.digest import digest  # noqa: E402
from runtime.fingerprint import fingerprint  # noqa: E402

TINY = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


def built(kind="Llama", **changes):
    """A model whose weights depend on the seed alone, whatever else its config says."""
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**TINY | changes)
    ).eval()


class Adapter(nn.Module):
    """A low-rank adapter around a linear layer, with the attributes of PEFT's."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        torch.manual_seed(7)
        self.lora_A = nn.ModuleDict({"mine": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"mine": nn.Linear(rank, base.out_features, bias=False)})
        self.scaling, self.merged_adapters = {"mine": 2.0}, []
        self._disable_adapters, self._active_adapter = False, "mine"

    def delta(self):
        return self.lora_B["mine"].weight @ self.lora_A["mine"].weight * self.scaling["mine"]

    def forward(self, x):
        out = self.base_layer(x)
        if self._disable_adapters or self.merged_adapters:
            return out
        return out + x @ self.delta().mT

    def merge(self):
        self.base_layer.weight.data += self.delta().detach()
        self.merged_adapters.append("mine")


class Packed(nn.Module):
    """A linear layer in 8 bits whose scales are neither parameter nor buffer, as bitsandbytes keeps them."""

    def __init__(self, base):
        super().__init__()
        self.scales = base.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((base.weight.detach() / self.scales).round().to(torch.int8), requires_grad=False)
        self.beside = {"absmax": self.scales[:2].clone()}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}absmax"] = self.beside["absmax"]

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scales).mT


def adapted():
    model = built()
    model.model.layers[1].self_attn.k_proj = Adapter(model.model.layers[1].self_attn.k_proj)
    return model


def packed():
    model = built()
    model.model.layers[0].mlp.up_proj = Packed(model.model.layers[0].mlp.up_proj)
    return model


def saved(model, path):
    with offload(model, parse_policy("full"), max_new_tokens=8) as kv, torch.no_grad():
        model(torch.arange(3, 35)[None], past_key_values=(cache := kv.cache()))
        kv.save(cache, path)


def load(model, path):
    with offload(model, parse_policy("full"), max_new_tokens=8) as kv:
        return kv.load(path)


def no_bias(model, value):
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] += value


def other_scale(model):
    model.model.layers[0].mlp.up_proj.scales[3] *= 2


def other_absmax(model):
    model.model.layers[0].mlp.up_proj.beside["absmax"][0] += 1


def set_of(name, value):
    def change(model):
        setattr(model.model.layers[1].self_attn.k_proj, name, value)

    return change


@pytest.mark.parametrize(
    ("make", "change", "says"),
    [
        (built, lambda m: no_bias(m, 1e-6), "other weights"),
        (built, lambda m: m.model.rotary_emb.inv_freq.mul_(1.001), "other weights"),
        (built, lambda m: m.model.norm.weight.data.neg_(), "other weights"),
        (built, lambda m: setattr(m.model.rotary_emb, "attention_scaling", 1.1), "attention_scaling"),
        (built, lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.3), "LlamaAttention.scaling"),
        (built, lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 1e-3), "variance_epsilon"),
        (built, lambda m: m.train(), "setting .*training"),
        (built, lambda m: setattr(m.config, "sliding_window", 9), "config sliding_window"),
        (adapted, lambda m: m.model.layers[1].self_attn.k_proj.merge(), "merged_adapters"),
        (adapted, set_of("_disable_adapters", True), "Adapter._disable_adapters"),
        (adapted, set_of("_active_adapter", "other"), "Adapter._active_adapter"),
        (adapted, set_of("scaling", {"mine": 1.0}), "Adapter.scaling"),
        (adapted, lambda m: m.model.layers[1].self_attn.k_proj.lora_B["mine"].weight.data.add_(1e-3), "other weights"),
        (packed, other_scale, "other weights"),
        (packed, other_absmax, "other weights"),
        (packed, lambda m: m.model.layers[0].mlp.up_proj.weight.data[0, 0].add_(1), "other weights"),
    ],
)
def test_a_model_that_was_changed_is_refused(make, change, says, tmp_path):
    saved(make(), path := tmp_path / "prefix")
    model = make()
    load(model, path)
    change(model)
    with pytest.raises(ValueError, match=f"prefix: was saved with the model llama .*, and here it is llama .*{says}"):
        load(model, path)


def test_what_a_first_forward_leaves_on_a_layer_is_no_other_model(tmp_path):
    saved(packed(), path := tmp_path / "prefix")
    model = packed()
    model.model.layers[0].mlp.up_proj.compute_type_is_set = True
    model.model.layers[0].mlp.up_proj.compute_dtype = torch.float32
    load(model, path)


@pytest.mark.parametrize(
    ("here", "says"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "config rope_parameters"),
        ({"rope_parameters": YARN}, "config rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "config rope_parameters"),
        ({"rms_norm_eps": 1e-5}, "config rms_norm_eps 1e-06 there, 1e-05 here"),
        ({"hidden_act": "gelu"}, "config hidden_act 'silu' there, 'gelu' here"),
        ({"attention_bias": True}, "config attention_bias False there, True here"),
    ],
)
def test_another_config_is_refused_and_named(here, says, tmp_path):
    saved(built(), path := tmp_path / "prefix")
    with pytest.raises(ValueError, match=says):
        load(built(**here), path)


@pytest.mark.parametrize(
    ("kind", "there", "here"),
    [
        ("Gemma2", {"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": 20.0}),
        ("Gemma2", {"query_pre_attn_scalar": 8}, {"query_pre_attn_scalar": 16}),
        ("Gemma2", {"sliding_window": 16}, {"sliding_window": 24}),
        ("Granite", {"attention_multiplier": 0.5}, {"attention_multiplier": 0.25}),
    ],
)
def test_what_other_families_compute_by_is_named(kind, there, here, tmp_path):
    more = {"head_dim": 8} if kind == "Gemma2" else {}
    saved(built(kind, **there, **more), path := tmp_path / "prefix")
    load(built(kind, **there, **more), path)
    with pytest.raises(ValueError, match=f"config {next(iter(here))}"):
        load(built(kind, **here, **more), path)


def test_the_same_model_from_its_own_folder_is_the_same(tmp_path):
    model = built()
    saved(model, path := tmp_path / "prefix")
    model.save_pretrained(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert fingerprint(again) == fingerprint(model)
    again.config.eos_token_id = again.generation_config.eos_token_id = 7
    again.config.use_cache = False
    load(again, path)
    load(copy.deepcopy(model), path)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        YARN,
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ],
)
def test_a_forward_does_not_change_what_a_model_is(rope):
    model = built(**{"rope_parameters": rope} if rope else {}, max_position_embeddings=64)
    before = fingerprint(model)
    with torch.no_grad():
        model(torch.arange(3, 98)[None])
    assert fingerprint(model) == before


def test_a_digest_covers_every_bit_and_the_form():
    x = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    whole = digest(x)
    assert digest(x.clone()) == digest(x.mT.contiguous().mT) == whole
    others = [x.double(), x.view(torch.int32), x.reshape(6, 4), x.flip(0), -x, x[:3], x.expand(1, 4, 6)]
    for at in range(24):
        other = x.clone()
        other.view(-1).view(torch.int32)[at] ^= 1 << at
        others.append(other)
    assert len({whole, *map(digest, others)}) == 1 + len(others)
    for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.complex64):
        assert digest(x.to(dtype)) == digest(x.to(dtype).clone())
    assert digest(torch.zeros(0)) != digest(torch.zeros(0, 1))
    assert digest(torch.tensor(1.0)) != digest(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="it lies on the meta device"):
        digest(x.to("meta"))
    with pytest.raises(ValueError, match="its bytes cannot be read"):
        digest(x.to_sparse())


def test_wrapped_tensors_are_read_through(tmp_path):
    from torch.testing._internal.two_tensor import TwoTensor

    x = torch.arange(6.0)
    assert digest(TwoTensor(x, x)) == digest(TwoTensor(x.clone(), x.clone()))
    assert digest(TwoTensor(x, x)) != digest(TwoTensor(x, x + 1))


def test_weights_on_disk_are_refused(tmp_path):
    saved(model := built(), path := tmp_path / "prefix")
    with offload(model, parse_policy("full"), max_new_tokens=8) as kv, torch.no_grad():
        model(torch.arange(3, 35)[None], past_key_values=(cache := kv.cache()))
        layer = model.model.layers[1].mlp
        layer.up_proj = layer.up_proj.to("meta")
        for attempt in (lambda: kv.save(cache, path), lambda: kv.load(path)):
            with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight, .* it lies on the meta device"):
                attempt()
