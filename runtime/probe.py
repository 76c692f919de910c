"""What a loaded model's attention does, learnt from one forward over a few tokens: no architecture is known by name.

Each layer of a cache sees the keys and values that the model hands over, and what becomes of them: whether they reach
Transformers' attention function as they are, what else it is given, and whether plain attention computes what the
model's own code does. A layer of which anything else is true cannot follow a policy, and says why.
"""

import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer
from transformers.masking_utils import eager_mask

from runtime.kernels.attention import merge, partial_attention
from runtime.rotary import Rotation
from runtime.rotation import alike, rotation_of

NAME = "kvsim_probe"
TOKENS = 6  # of the forward: fewer than any window, enough to tell one rotation from another
WITNESS = "_kvsim_witness"  # attribute of the keys that a layer of the probe's cache hands on
HIDDEN = -1e4  # an additive mask hides what it adds this much or less to
TAKEN = frozenset({"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "s_aux"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenLayer:
    """One layer of a model's cache, as a forward has shown it.

    `kind` is `full`, `sliding` (with `window_tokens`) or `linear` (with `state_elements`); `module` is the name of its
    attention module, empty where none came. `refusal` says why a layer that holds all keys and values cannot follow a
    policy; `by_itself`, why the runtime cannot attend in the model's place, so that only policies serve which hand back
    all keys and values, as a stock cache does. `shared`: further layers attend to the layer's keys. `rotation` is None
    where it was not recognised.
    """

    kind: str
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    v_head_dim: int = 1
    window_tokens: int = 0
    state_elements: int = 0
    module: str = ""
    refusal: str = ""
    by_itself: str = ""
    shared: bool = False
    rotation: Rotation | None = None


@dataclass(slots=True)
class _Witness:
    """What happens to the keys and values of one cache layer."""

    updates: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None
    modules: list[nn.Module] = field(default_factory=list)
    heads: int = 0
    differs: str = ""  # from attention as the runtime computes it
    by_itself: str = ""


_PROBED: "WeakKeyDictionary[nn.Module, tuple[str, tuple[SeenLayer, ...]]]" = WeakKeyDictionary()
_LOCK = threading.RLock()
# `strangers`: how attention to keys of no cache layer differs from the runtime's; `masks`: what was made, by address.
_NOW = threading.local()


def probe(model: Any) -> tuple[SeenLayer, ...]:
    """The layers of a model's cache; one forward of `TOKENS` tokens, once for each model and config.

    Raises ValueError for a model that is no decoder, or does not run on a plain prompt.
    """
    with _LOCK:
        config = model.config.to_json_string(use_diff=False)
        known = _PROBED.get(model)
        if known is None or known[0] != config:
            known = _PROBED[model] = (config, _probe(model))
        return known[1]


def _probe(model: Any) -> tuple[SeenLayer, ...]:
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type} is an encoder and a decoder: its attention to the encoder's tokens is cached apart, "
            "which the runtime does not execute; use a decoder-only model"
        )
    cache = DynamicCache(config=config)
    if cache.layers and not any(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ValueError(
            f"{config.model_type} keeps a state of constant size and no keys and values of tokens; a policy has "
            "nothing to place"
        )
    cache.layers = cache.layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]
    witnesses = [_Witness() for _ in cache.layers]
    for layer, witness in zip(cache.layers, witnesses, strict=True):
        if hasattr(layer, "update"):
            vars(layer)["update"] = partial(_update, witness, layer.update)
    heard = _forward(model, cache)
    names = {module: name for name, module in model.named_modules()}
    served = Counter(module for witness in witnesses for module in set(witness.modules))
    for module in [module for module, layers in served.items() if layers > 1]:
        heard.pop(module, None)  # its angles cannot be told apart by layer
    layers = [
        _seen(layer, witness, heard, cache, names) for layer, witness in zip(cache.layers, witnesses, strict=True)
    ]
    reasons = (layer.by_itself for layer in layers)
    why = next(filter(None, (*reasons, *_NOW.strangers)), "")
    if not why:
        return tuple(layers)
    return tuple(replace(layer, by_itself=layer.by_itself or why, rotation=None) for layer in layers)


_Heard = dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]  # what each module was called with


def _forward(model: Any, cache: DynamicCache) -> _Heard:
    heard: _Heard = {}

    def hear(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        heard[module] = (args, given)

    hooks = [
        module.register_forward_pre_hook(hear, with_kwargs=True)
        for module in model.modules()
        if not isinstance(module, nn.ModuleList) and hasattr(module, "layer_idx")
    ]
    decoder = model.get_decoder()
    decoder = decoder if hasattr(decoder, "set_attn_implementation") else model
    # What is to happen before a model's first forward, such as unpacking its weights, happens before this one.
    asked = model if model._forward_pre_hooks else decoder  # noqa: SLF001 - there is no other way to see them
    ids = _harmless_ids(model.config).to(model.device)
    _NOW.strangers, _NOW.masks = [], {}
    try:
        with _bound(decoder), torch.no_grad(), torch.random.fork_rng(_devices(model)):
            asked(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
            for hook in hooks:
                hook.remove()
            return heard
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{model.config.model_type} does not run as a decoder on a prompt of {TOKENS} tokens with a cache "
            f"({type(error).__name__}: {said}); the runtime takes models that do"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _harmless_ids(config: Any) -> Tensor:
    """Ids (1, TOKENS) that stand for no image, sound or end of text."""
    parts = (config, config.get_text_config())
    special: set[int] = set()
    for part in parts:
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list) else [value])
    plain = [i for i in range(1, parts[1].vocab_size) if i not in special][:TOKENS]
    return torch.tensor([(plain * TOKENS)[:TOKENS]])


def _devices(model: Any) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


@contextmanager
def _bound(decoder: Any) -> Iterator[None]:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    before = decoder.config._attn_implementation  # noqa: SLF001 - there is no public way to read it
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _update(
    witness: _Witness, update: Callable[..., Any], keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
) -> Any:
    held_keys, held_values = update(keys, values, *args, **kwargs)
    witness.updates += 1
    witness.keys, witness.values = held_keys.view_as(held_keys), held_values
    setattr(witness.keys, WITNESS, witness)
    return witness.keys, held_values


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager attention, compared with what the runtime would compute of the same."""
    witness = getattr(key, WITNESS, None)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    ours = _plain(query, key, value, attention_mask, given)
    if eager is None:
        theirs, differs = ours, "has no eager attention to compare the runtime's with"
    else:
        theirs = eager(module, query, key, value, attention_mask, **given)[0]
        named = set(inspect.signature(eager).parameters) - TAKEN
        unknown = sorted(name for name in named if given.get(name) is not None)
        unknown += ["a mask that adds to scores"] if _biased(attention_mask) else []
        unknown += ["a mask that the model has changed"] if _changed(attention_mask) else []
        differs = "" if alike(ours, theirs) else "attends in another way than softmax(scale q k) v with caps and sinks"
        differs = f"gives attention {', '.join(unknown)}, which no policy's kernels take" if unknown else differs
    if witness is None:
        _NOW.strangers.append(differs)
        return theirs, None
    witness.modules.append(module)
    witness.heads = query.shape[1]
    witness.differs = witness.differs or differs
    if value is not witness.values:
        witness.by_itself = "attends to other values than it caches"
    elif not getattr(module, "is_causal", True):
        witness.by_itself = "attends to tokens after its own"
    return theirs, None


def _biased(mask: Tensor | None) -> bool:
    """Whether a mask does more than hide or show."""
    return mask is not None and mask.is_floating_point() and bool(((mask != 0) & (mask > HIDDEN)).any())


def _changed(mask: Tensor | None) -> bool:
    """Whether a mask is not what `_mask` has made, or a view of it."""
    return mask is not None and mask.untyped_storage().data_ptr() not in _NOW.masks


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    made: Tensor | None = eager_mask(*args, **kwargs)
    if made is not None:
        _NOW.masks[made.untyped_storage().data_ptr()] = made
    return made


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, given: dict[str, Any]) -> Tensor:
    """The runtime's attention, (batch, new_tokens, heads, head_dim); of shapes that it does not take, zeros."""
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        mask = mask if mask.dtype == torch.bool else mask >= 0
    try:
        scale = given.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        part = partial_attention(query, key, value, scale=scale, mask=mask, softcap=given.get("softcap"))
        out = merge([part], sink_logits=given.get("s_aux")).to(query.dtype)
    except ValueError:
        out = query.new_zeros(*query.shape[:3], value.shape[3])
    return out.transpose(1, 2)


def _seen(layer: Any, witness: _Witness, heard: _Heard, cache: DynamicCache, names: dict[nn.Module, str]) -> SeenLayer:
    shape: dict[str, Any] = {}
    if witness.keys is not None and witness.values is not None and witness.keys.dim() == 4:
        _, kv_heads, _, head_dim = witness.keys.shape
        shape = {"kv_heads": kv_heads, "head_dim": head_dim, "v_head_dim": witness.values.shape[3]}
        shape["heads"] = witness.heads or kv_heads
    if witness.modules:
        shape["module"] = names.get(witness.modules[0], "")
    shape["by_itself"] = witness.differs
    if type(layer) not in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
        states = [*_tensors(getattr(layer, "conv_states", None)), *_tensors(getattr(layer, "recurrent_states", None))]
        window = getattr(layer, "sliding_window", None)
        if window and not states:
            return SeenLayer(kind="sliding", window_tokens=window, **shape)
        if not isinstance(layer, DynamicLayer) or window:
            return SeenLayer(kind="linear", state_elements=sum(state[0].numel() for state in states), **shape)
        kept = type(layer).__name__
        shape["refusal"] = f"keeps more than keys and values (a {kept}), which no policy places"
    shape.setdefault("refusal", _refusal(witness))
    shape["by_itself"] = witness.differs or witness.by_itself or _by_itself(witness)
    shape["shared"] = len(set(witness.modules)) > 1
    if not shape["refusal"] and not shape["by_itself"]:
        module = witness.modules[0]
        shape["rotation"] = rotation_of(module, *heard[module], cache) if module in heard else None
    return SeenLayer(kind="full", **shape)


def _tensors(states: Any) -> list[Tensor]:
    found = states.values() if isinstance(states, dict) else [states]
    return [state for state in found if isinstance(state, Tensor)]


def _refusal(witness: _Witness) -> str:
    if not witness.updates or witness.keys is None or witness.values is None:
        return "hands no keys and values to the cache"
    if witness.updates > 1:
        return "hands keys and values to the cache more than once in a step"
    if witness.keys.dim() != 4 or witness.keys.shape[:3] != witness.values.shape[:3]:
        return f"caches keys of shape {tuple(witness.keys.shape)} and values of shape {tuple(witness.values.shape)}"
    return ""


def _by_itself(witness: _Witness) -> str:
    if not witness.modules:
        if _NOW.strangers:
            return "changes keys between the cache and attention (an MLA latent is expanded, heads are repeated)"
        return "computes attention by itself, not through Transformers' attention interface"
    return ""
