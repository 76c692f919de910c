"""What a quantisation config says: the format of each module's weights, and that of cached keys and values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from policies.hf.keys import Keys
from policies.hf.module_names import ModuleNames
from policies.hf.weight_types import compressed_tensors_format, modelopt_format, quark_format
from policies.shown import shown
from policies.weight_formats import WeightFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a checkpoint is quantised.

    Of `groups`, the first that names a module decides, for modules that are not `kept` as they were; `default` is for
    all others, the head among them where `head` says so. `kv_dtype` is of the cache, None for the model's own.
    """

    default: WeightFormat | None
    groups: tuple[tuple[ModuleNames, WeightFormat | None], ...] = ()
    kept: ModuleNames
    head: bool = False
    kv_dtype: str | None = None
    kv_scale_bits: int = 0  # of each of the two scales of a layer

    def format_of(self, name: str) -> WeightFormat | None:
        """The format of a module such as `layers.3.mlp.up_proj`; None where it is not converted."""
        if name in self.kept:
            return None
        for names, weight_format in self.groups:
            if name in names:
                return weight_format
        return self.default if self.head or name != "lm_head" else None


def scheme_of(keys: Keys, config_name: str) -> Scheme | None:
    """The scheme of a config's `quantization_config`; None where it has none.

    Raises ValueError for a method that is not known, and for settings that do not belong to it.
    """
    settings = keys.value("quantization_config")
    if settings is None:
        settings = keys.value("compression_config")
    if settings in (None, {}):
        return None
    if not isinstance(settings, Mapping):
        raise keys.error("quantization_config", "must be an object")
    method = settings.get("quant_method")
    if method is None and any(key in settings for key in ("quant_algo", "quantized_layers")):
        method = "modelopt"
    if method is None and any(key in settings for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"
    read = _METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        raise keys.error("quantization_config", f"is not understood; known quant_method: {', '.join(_METHODS)}")
    if isinstance(settings.get("quantization"), Mapping):
        settings = {**settings, **settings["quantization"]}
    beside = {"expert_dtype": keys.value("expert_dtype")}
    return read(Keys({**beside, **settings}, f"{config_name}, quantization_config", {}))


def _kept(keys: Keys, *names: str) -> ModuleNames:
    return ModuleNames(item for name in names for item in keys.sequence(name))


def _gptq(keys: Keys) -> Scheme:
    """AutoGPTQ's and GPTQModel's tensors: words of packed weights and zero points, fp16 scales, an index of inputs."""
    default = _packed(keys, index=True)
    groups = []
    for pattern, changes in keys.mapping("dynamic").items():
        names = ModuleNames([f"re:{pattern[2:] if pattern[:2] in ('+:', '-:') else pattern}"])
        settings = {"bits": keys.number("bits"), "group_size": keys.number("group_size", -1, least=-1)}
        if isinstance(changes, Mapping):
            settings |= changes
        changed = Keys(settings, "dynamic", {})
        groups.append((names, None if pattern.startswith("-:") else _packed(changed, index=True)))
    inside = [name for names in keys.sequence("modules_in_block_to_quantize") for name in _listed(names)]
    if inside:
        groups.append((ModuleNames(inside), default))
    return Scheme(
        default=None if inside else default,
        groups=tuple(groups),
        kept=_kept(keys, "modules_to_not_convert"),
        head=keys.flag("lm_head", False),
    )


def _listed(names: object) -> list[Any]:
    return names if isinstance(names, list) else [names]


def _awq(keys: Keys) -> Scheme:
    """AutoAWQ's tensors: words of packed weights and zero points, fp16 scales."""
    return Scheme(default=_packed(keys, index=False), kept=_kept(keys, "modules_to_not_convert"))


def _auto_round(keys: Keys) -> Scheme:
    """AutoRound's, packed as GPTQ's without an index of inputs; single modules may have other bits."""
    groups = []
    for name, changes in keys.mapping("extra_config").items():
        if isinstance(changes, Mapping) and "bits" in changes:
            base = {"bits": keys.number("bits"), "group_size": keys.number("group_size", 128, least=-1)}
            wide = isinstance(changes["bits"], int) and changes["bits"] >= 16
            changed = None if wide else _packed(Keys({**base, **changes}, "extra_config", {}), index=False)
            groups.append((ModuleNames([name]), changed))
    return Scheme(default=_packed(keys, index=False), groups=tuple(groups), kept=_kept(keys, "modules_to_not_convert"))


def _packed(keys: Keys, *, index: bool) -> WeightFormat:
    # AutoAWQ's own file has other names.
    name = "w_bit" if "w_bit" in keys else "bits"
    bits, group = keys.number(name), keys.number("q_group_size" if "q_group_size" in keys else "group_size", 128, -1)
    if bits not in (2, 3, 4, 8):
        raise keys.error(name, "must be 2, 3, 4 or 8")
    return WeightFormat(
        dtype="int8" if bits == 8 else "int4",
        bits=bits,
        columns=max(0, group),
        zero_bits=bits,
        input_bits=32 if index else 0,
    )


def _fp8(keys: Keys) -> Scheme:
    """DeepSeek's FP8: an fp32 scale for each block, or for a matrix where there are no blocks."""
    block = keys.sequence("weight_block_size")
    rows, columns = 0, 0
    if block:
        if len(block) != 2 or not all(type(size) is int and 0 < size <= 2**20 for size in block):
            raise keys.error("weight_block_size", "must be two whole numbers, such as [128, 128]")
        rows, columns = block
    default = WeightFormat(
        dtype="fp8",
        bits=8,
        rows=rows,
        columns=columns,
        scale_bits=32,
        fixed_bytes=4 if keys.value("activation_scheme") == "static" else 0,
        quantises_activations=True,
    )
    groups: tuple[tuple[ModuleNames, WeightFormat | None], ...] = ()
    if "moe_quant_algo" in keys:  # DeepSeek-V4's experts, converted once more by ModelOpt
        experts = modelopt_format(keys, keys.value("moe_quant_algo"), keys.value("group_size"))
        groups = ((ModuleNames(["experts"]), experts),)
    elif keys.value("expert_dtype") == "fp4":  # DeepSeek-V4 as it is published
        groups = ((ModuleNames(["experts"]), WeightFormat(dtype="mxfp4", bits=4, columns=32, scale_bits=8)),)
    return Scheme(default=default, groups=groups, kept=_kept(keys, "modules_to_not_convert", "ignored_layers"))


def _fbgemm(keys: Keys) -> Scheme:
    """FBGEMM's FP8: an fp32 scale for each output."""
    default = WeightFormat(dtype="fp8", bits=8, scale_bits=32, quantises_activations=True)
    return Scheme(default=default, kept=_kept(keys, "modules_to_not_convert"))


def _mxfp4(keys: Keys) -> Scheme:
    """gpt-oss: routed experts in MXFP4, and nothing else."""
    experts = WeightFormat(dtype="mxfp4", bits=4, columns=32, scale_bits=8)
    kept = _kept(keys, "modules_to_not_convert")
    return Scheme(default=None, groups=((ModuleNames(["experts"]), experts),), kept=kept)


def _bitsandbytes(keys: Keys) -> Scheme:
    """bitsandbytes: blocks of 64 four-bit elements, their fp32 scales quantised once more or not; or LLM.int8()."""
    four = any(keys.flag(key, False) for key in ("load_in_4bit", "_load_in_4bit"))
    if not four and not any(keys.flag(key, False) for key in ("load_in_8bit", "_load_in_8bit")):
        raise keys.error("load_in_4bit", "or load_in_8bit must be true")
    if not four:
        default = WeightFormat(dtype="int8", bits=8, scale_bits=32, fixed_bytes=1, quantises_activations=True)
    elif keys.flag("bnb_4bit_use_double_quant", False):
        # 256 scales in 8 bits share one in fp32; two tables, of 16 and of 256 values in fp32.
        default = WeightFormat(
            dtype="int4", bits=4, columns=64, scale_bits=8, scales_per_scale=256, fixed_bytes=4 * (16 + 256)
        )
    else:
        default = WeightFormat(dtype="int4", bits=4, columns=64, scale_bits=32, fixed_bytes=4 * 16)
    return Scheme(default=default, kept=_kept(keys, "llm_int8_skip_modules"))


def _compressed_tensors(keys: Keys) -> Scheme:
    """compressed-tensors: groups of modules, each with a format; all linear ones but those it ignores."""
    default, groups = None, []
    for name, group in keys.mapping("config_groups").items():
        if not isinstance(group, Mapping):
            raise keys.error("config_groups", f"must hold objects; {shown(name)} is none")
        inner = Keys(group, f"{name} of config_groups", {})
        targets = [target for target in inner.sequence("targets") if target != "Linear"]
        weight_format = compressed_tensors_format(inner, str(inner.value("format") or keys.value("format") or ""))
        if targets:
            groups.append((ModuleNames(targets), weight_format))
        if len(targets) < len(inner.sequence("targets")):
            default = weight_format
    if "config_groups" not in keys:
        raise keys.error("config_groups", "is needed: it says how which modules are stored")
    sparsity = keys.mapping("sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise keys.error("sparsity_config", "must have the format dense; sparse matrices are not counted")
    return Scheme(
        default=default,
        groups=tuple(groups),
        kept=_kept(keys, "ignore"),
        head=True,
        kv_dtype=_kv_dtype(keys, "kv_cache_scheme"),
        kv_scale_bits=16,
    )


def _modelopt(keys: Keys) -> Scheme:
    """NVIDIA ModelOpt, from `hf_quant_config.json` or from the config itself."""
    if "config_groups" in keys and not any(key in keys for key in ("quant_algo", "quantized_layers")):
        return _compressed_tensors(keys)
    groups: dict[Any, list[str]] = {}
    for name, layer in keys.mapping("quantized_layers").items():
        if not isinstance(layer, Mapping):
            raise keys.error("quantized_layers", f"must hold objects; {shown(name)} is none")
        groups.setdefault((_plain(layer.get("quant_algo")), _plain(layer.get("group_size"))), []).append(name)
    listed = tuple(
        (ModuleNames(names), modelopt_format(keys, algorithm, group)) for (algorithm, group), names in groups.items()
    )
    algorithm = keys.value("quant_algo")
    mixed = algorithm == "MIXED_PRECISION" or (algorithm is None and bool(groups))
    return Scheme(
        default=None if mixed else modelopt_format(keys, algorithm, keys.value("group_size")),
        groups=listed,
        kept=_kept(keys, "exclude_modules", "ignore"),
        kv_dtype=_kv_dtype(keys, "kv_cache_quant_algo") or _kv_dtype(keys, "kv_cache_scheme"),
        kv_scale_bits=32,
    )


def _quark(keys: Keys) -> Scheme:
    """AMD Quark: one scheme for all linear modules, others for some by name."""
    groups = [
        (ModuleNames([name]), quark_format(keys, layer)) for name, layer in keys.mapping("layer_quant_config").items()
    ]
    cached = [
        layer["output_tensors"]
        for layer in keys.mapping("kv_cache_quant_config").values()
        if isinstance(layer, Mapping) and layer.get("output_tensors")
    ]
    return Scheme(
        default=quark_format(keys, keys.mapping("global_quant_config")),
        groups=tuple(groups),
        kept=_kept(keys, "exclude"),
        head=True,
        kv_dtype="fp8" if cached else None,
        kv_scale_bits=32,
    )


_METHODS: Mapping[str, Callable[[Keys], Scheme]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "modelopt_mixed": _modelopt,
    "fbgemm_fp8": _fbgemm,
    "auto-round": _auto_round,
    "bitsandbytes": _bitsandbytes,
    "quark": _quark,
}


_KV_KINDS: Mapping[tuple[object, object], str] = {
    (8, "float"): "fp8",
    (8, "int"): "int8",
    (4, "float"): "nvfp4",
    (4, "int"): "int4",
}


def _kv_dtype(keys: Keys, key: str) -> str | None:
    """The type of cached keys and values, by name or as bits and kind."""
    scheme = keys.value(key)
    if scheme in (None, "none", "None", "auto"):
        return None
    if isinstance(scheme, Mapping):
        found = _KV_KINDS.get((_plain(scheme.get("num_bits")), _plain(scheme.get("type"))))
    else:
        found = {"FP8": "fp8", "INT8": "int8", "NVFP4": "nvfp4", "FP4": "nvfp4"}.get(str(scheme).upper())
    if found is None:
        raise keys.error(key, "must be FP8, INT8, NVFP4, or 8 or 4 bits of type float or int")
    return found


def _plain(value: object) -> object:
    return value if isinstance(value, int | str) else None
