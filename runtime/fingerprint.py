"""What decides a model's keys and values, told apart: its config, the settings of its modules, and its weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies.shown import shown
from runtime.digest import digests

# Keys of a config that change neither keys nor values: names, outputs, generation, what the weights say themselves.
IDLE_KEYS = frozenset(
    (
        *("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "initializer_range"),
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "id2label", "label2id", "problem_type"),
        *("attn_implementation", "_attn_implementation", "_experts_implementation", "experts_implementation"),
    )
)
# Attributes of a module that are no setting: PyTorch's own tables, how it was loaded, and what a forward leaves behind.
IDLE_ATTRIBUTES = frozenset((*vars(nn.Module()), "_is_hf_initialized", "_attn_implementation")) - {"training"}
IDLE_ATTRIBUTES |= {"gradient_checkpointing", "name_or_path", "warnings_issued", "all_tied_weights_keys"}
IDLE_ATTRIBUTES |= {"prepare_inputs_for_generation"}  # which `runtime.heard` replaces
# What quantised layers set in their first forward: bitsandbytes' type of its input, ExLlama's handles of this process.
IDLE_ATTRIBUTES |= {"compute_type_is_set", "compute_dtype", "q_handle", "q4"}
PASSING = "max_seq_len_cached"  # rotary tables that grow with the prompt end their attributes so
GROWING = ("dynamic", "longrope")  # kinds of rotary angles that a forward replaces: those that they began with count


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """One model: `settings` are the values of every attribute by class, for reading; the digests cover each module."""

    config: dict[str, Any]
    settings: dict[str, list[str]]
    settings_digest: str
    weights_digest: str

    def __str__(self) -> str:
        """The kind of model and both digests, short: "llama (0123456789ab, weights 0123456789ab)"."""
        kind, settings = self.config.get("model_type", "model"), f"{sorted(self.config.items())} {self.settings_digest}"
        return f"{kind} ({sha256(settings.encode()).hexdigest()[:12]}, weights {self.weights_digest[:12]})"

    def difference(self, other: "Fingerprint") -> str | None:
        """Where another model differs, with both values ("config rope_theta 1e4, here 1e6"), or None."""
        for what, mine, others in (
            ("config", self.config, other.config),
            ("setting", self.settings, other.settings),
        ):
            for key in sorted({*mine, *others}):
                if mine.get(key) != others.get(key) or (key in mine) != (key in others):
                    return f"{what} {shown(key)[1:-1]} {shown(mine.get(key))} there, {shown(others.get(key))} here"
        if self.settings_digest != other.settings_digest:
            return "the same settings lie on other modules"
        return None if self.weights_digest == other.weights_digest else "other weights"


def fingerprint(model: Any) -> Fingerprint:
    """The fingerprint of a model as it would compute now: every parameter and buffer is read whole.

    Adapters count, with whether they are merged, active or disabled, as do quantised weights with their scales and
    whether the model is in training. Raises ValueError for weights that cannot be read, as when offloaded to disk.
    """
    settings: dict[str, set[str]] = {}
    summed = sha256()
    for name, module in model.named_modules():
        summed.update(f"{name} {type(module).__qualname__}\n".encode())
        for attribute, value in sorted(vars(module).items()):
            said = None if _is_idle(module, attribute) else _plain(value)
            if said is not None:
                summed.update(f"{attribute} {said}\n".encode())
                settings.setdefault(f"{type(module).__name__}.{attribute}", set()).add(said)
    weights = digests(_tensors(model))
    whole = sha256("\n".join(f"{name} {each}" for name, each in sorted(weights.items())).encode())
    return Fingerprint(
        config=_written(model.config.to_dict()),
        settings={key: sorted(values) for key, values in settings.items()},
        settings_digest=summed.hexdigest(),
        weights_digest=whole.hexdigest(),
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, what quantised modules write beside them, and tensors that are plain attributes."""
    replaced = set()
    for name, module in model.named_modules():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        if not isinstance(module, PreTrainedModel):
            plain = vars(module).items()
            own |= {key: value for key, value in plain if isinstance(value, Tensor) and not _is_idle(module, key)}
        growing = any(kind in GROWING for kind in _rope_kinds(module))
        for key, value in own.items():
            if growing and key.endswith("inv_freq") and not key.endswith("original_inv_freq"):
                replaced.add(f"{name}.{key}")
            else:
                yield f"{name}.{key}", value
    for key, value in _written_state(model).items():
        if isinstance(value, Tensor) and key not in replaced:
            yield key, value
        elif (said := _plain(value)) is not None:
            yield key, torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8)


def _written_state(model: nn.Module) -> dict[str, Any]:
    """The model's `state_dict`, after which it computes as before.

    On CPUs with products in bf16, bitsandbytes' 4-bit layers unpack themselves in it, by what it calls a best effort:
    their next forward would give other values.
    """
    states = ((weight, getattr(weight, "quant_state", None)) for weight in model.parameters())
    packed = [(weight, state) for weight, state in states if getattr(state, "packing_format_for_cpu", False)]
    before = [(weight, weight.data, state, dict(vars(state))) for weight, state in packed]
    try:
        return model.state_dict()
    finally:
        for weight, data, state, fields in before:
            weight.data, weight.quant_state = data, state  # type: ignore[attr-defined]  # theirs
            vars(state).clear()
            vars(state).update(fields)


def _rope_kinds(module: nn.Module) -> list[str]:
    kind = getattr(module, "rope_type", None)
    return [kind] if isinstance(kind, str) else list(kind.values()) if isinstance(kind, dict) else []


def _is_idle(module: nn.Module, attribute: str) -> bool:
    if attribute in IDLE_ATTRIBUTES or attribute.endswith(PASSING):
        return True
    return isinstance(module, PreTrainedModel) and attribute.startswith("_")


def _plain(value: Any) -> str | None:
    """Numbers, names, flags, named functions and collections of them as text; None for everything else."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, dict):
        pairs = [(str(key), _plain(each)) for key, each in value.items()]
        return None if any(said is None for _, said in pairs) else repr(sorted(pairs))
    if isinstance(value, list | tuple | set | frozenset):
        each = [_plain(x) for x in value]
        if any(said is None for said in each):
            return None
        return repr(each if isinstance(value, list | tuple) else sorted(map(str, each)))
    return None


def _written(config: Any) -> Any:
    """A config as JSON has it, without idle keys in it or in the configs inside."""
    if isinstance(config, dict):
        return {str(key): _written(value) for key, value in config.items() if key not in IDLE_KEYS}
    if isinstance(config, list | tuple):
        return [_written(value) for value in config]
    if config is None or isinstance(config, bool | int | str) or (isinstance(config, float) and isfinite(config)):
        return config
    return str(config)
