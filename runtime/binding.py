"""Installs the runtime in a model for as long as any context needs it, and hears each forward of its decoder.

Contexts on one model may nest, end in any order and belong to different threads: the first of them installs, the last
one takes away.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin

from runtime.attention import NAME, attention, leave_to, mask
from runtime.cache import TieredCache
from runtime.heard import Heard, hear, takes_ids, undo_of
from runtime.rotary import angles_of

LOG = logging.getLogger(__name__)
_LOCK = threading.RLock()
_OPEN: dict[Hashable, "_Open"] = {}  # what is installed, by what and where


class _Open:
    """Something that is installed for `contexts` contexts; `where` is kept, so that its id stays its own."""

    def __init__(self, where: Any, undo: Callable[[], None]) -> None:
        self.where, self.undo, self.contexts = where, undo, 0


def decoder_of(model: Any) -> Any:
    """The module that is given the cache: of a vision-language model the language model alone.

    Raises ValueError for a model that PyTorch compiles, and for one that is training with dropout in its attention.
    """
    if any(_is_compiled(module) for module in model.modules()):
        raise ValueError(
            "the model is compiled (torch.compile), which the runtime does not execute; pass it uncompiled"
        )
    decoder = model.get_decoder()
    decoder = decoder if hasattr(decoder, "set_attn_implementation") else model  # ModernBERT's is no model
    if model.training and any(getattr(module, "attention_dropout", None) for module in decoder.modules()):
        raise ValueError("the model is training, with dropout in its attention; call model.eval()")
    return decoder


@contextmanager
def bound(model: Any, rotating: Mapping[int, str], *, attends: bool) -> Iterator[None]:
    """Let the decoder of `model` attend through the runtime inside this context, or by itself (`attends` is False).

    Caches hear how attention modules rotate: `rotating` has their names in `model` by layer of the cache.

    Raises ValueError for a decoder whose attention cannot be replaced.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    decoder = decoder_of(model)
    with ExitStack() as stack:
        for module in filter(takes_ids, model.modules()):
            stack.enter_context(_installed("ids", module, partial(hear, module, _heard_of)))
        before = _implementation(decoder)
        if attends:
            undo = stack.enter_context(_installed("attention", decoder.config, lambda: _replace(decoder)))
            before = undo.args[0]
        now = _implementation(decoder)
        stack.enter_context(_installed("forward", decoder, lambda: _watch(decoder, before, now)))
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                stack.enter_context(_installed("generate", module, partial(_guard, module)))
        if takes_ids(model):
            stack.enter_context(_installed("replays", model, partial(_let_replay, model)))
        if rotating:
            stack.enter_context(_installed("angles", decoder, lambda: _listen(model, rotating)))
        yield


@contextmanager
def _installed(what: str, where: Any, install: Callable[[], Any]) -> Iterator[Any]:
    """Install something, unless another context has, and say what undoes it; the last context does that."""
    key = (what, id(where))
    with _LOCK:
        if key not in _OPEN:
            _OPEN[key] = _Open(where, install())
        _OPEN[key].contexts += 1
        undo = _OPEN[key].undo
    try:
        yield undo
    finally:
        with _LOCK:
            _OPEN[key].contexts -= 1
            if not _OPEN[key].contexts:
                _OPEN.pop(key).undo()


def _replace(decoder: Any) -> "partial[None]":
    """Give the decoder our attention function."""
    before = _implementation(decoder)
    decoder.set_attn_implementation(NAME)
    if _implementation(decoder) != NAME:
        raise ValueError(
            f"{type(decoder).__name__} computes attention in a way of its own, which Transformers cannot replace; the "
            "runtime does not execute it"
        )
    return partial(decoder.set_attn_implementation, before)


def _watch(decoder: torch.nn.Module, before: str, now: str) -> Callable[[], None]:
    """Let caches know when a forward of the decoder begins and ends, and users when it has none.

    Attention without a cache of ours stays that of the implementation `before`; `now` is what is set here.
    """
    warned = False

    def begin(decoder: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        nonlocal warned
        cache = _cache_among(args, given)
        leave_to(None if cache is not None else before)
        if cache is not None:
            _check_forward(decoder, given)
            inputs = (given.get("input_ids"), given.get("inputs_embeds"), *args[:1])
            ids = next((x for x in inputs if x is not None), None)
            if ids is not None:  # else the decoder itself refuses
                batch, new = ids.shape[:2]
                cache.begin(decoder, batch, new, given.get("position_ids"))
        elif given.get("use_cache") is not False and not warned and _implementation(decoder) == now:
            warned = True
            LOG.warning(
                "a forward inside offload() has no cache of it, so that no policy is applied; pass "
                "past_key_values=kv.cache()"
            )

    def finish(_decoder: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any], _out: Any) -> None:
        leave_to(None)
        cache = _cache_among(args, given)
        if cache is not None:
            cache.finish()

    hooks = (
        decoder.register_forward_pre_hook(begin, with_kwargs=True),
        decoder.register_forward_hook(finish, with_kwargs=True),
    )
    return undo_of(hooks)


def _check_forward(decoder: Any, given: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("torch.compile has come upon a kvsim cache; call the model uncompiled inside offload()")
    if ("attention", id(decoder.config)) not in _OPEN:
        return  # the model attends by itself
    if _implementation(decoder) != NAME:
        raise ValueError(
            f"the attention implementation was set to {_implementation(decoder)!r} inside offload(); set it before"
        )
    if given.get("output_attentions", getattr(decoder.config, "output_attentions", False)):
        raise ValueError("output_attentions=True: a policy does not compute all weights; leave it out inside offload()")


def _guard(model: Any) -> Callable[[], None]:
    """Let `generate` refuse what it would silently do with a cache that it cannot use."""
    prepare = model.prepare_inputs_for_generation

    @wraps(prepare)
    def guarded(input_ids: torch.Tensor, *args: Any, **given: Any) -> dict[str, Any]:
        cache, new = given.get("past_key_values"), given.get("next_sequence_length")
        if isinstance(cache, TieredCache):
            cache.check_usable()
            if new is not None and new < 1:
                raise ValueError(
                    f"the cache has {cache.get_seq_length()} tokens and the prompt {input_ids.shape[1]}: nothing is "
                    "new; give at least one token more, or a copy.deepcopy of a cache of fewer"
                )
        prepared: dict[str, Any] = prepare(input_ids, *args, **given)
        if isinstance(cache, TieredCache) and prepared.get("past_key_values") is not cache:
            if cache.get_seq_length():
                raise ValueError(
                    f"{type(model).__name__} has put the cache aside at token {input_ids.shape[1]}, where its rotary "
                    "angles change (LongRoPE): what is cached was rotated by others; begin with a prompt beyond that "
                    "length, or stop before it"
                )
            prepared["past_key_values"] = cache  # there is nothing in it that could be rotated otherwise
        if isinstance(cache, TieredCache) and cache.tokens:
            cache.heard.compare(cache.tokens, input_ids, prepared.get("input_ids"), given)
        return prepared

    return _put(model, "prepare_inputs_for_generation", guarded)


def _let_replay(model: Any) -> Callable[[], None]:
    """Let caches that capture their decode steps replay them in place of the model's forward."""
    forward = model.forward
    names = tuple(signature(forward).parameters)

    @wraps(forward)
    def replaying(*args: Any, **given: Any) -> Any:
        cache = _cache_among(args, given)
        if cache is None or cache.captured is None:
            return forward(*args, **given)
        return cache.captured.forward(cache, forward, {**dict(zip(names, args, strict=False)), **given})

    return _put(model, "forward", replaying)


def _put(model: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Let `function` stand for a model's method; what is returned brings back what was there."""
    before = vars(model).get(name)  # None: its class's own
    setattr(model, name, function)

    def undo() -> None:
        if before is None:
            delattr(model, name)
        else:
            setattr(model, name, before)

    return undo


def _listen(model: torch.nn.Module, rotating: Mapping[int, str]) -> Callable[[], None]:
    """Pass on the angles that each attention module gets."""

    def hear(layer: int, _module: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        cache = _cache_among(args, given)
        if cache is None:
            return
        handed = [given["position_embeddings"]] if "position_embeddings" in given else args
        angles = next((found for part in handed if (found := angles_of(part)) is not None), None)
        if angles is not None:
            cache.angles(layer, *angles)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(hear, layer), with_kwargs=True)
        for layer, name in rotating.items()
    ]
    return undo_of(hooks)


def _heard_of(cache: Any) -> Heard | None:
    return cache.heard if isinstance(cache, TieredCache) else None


def _cache_among(args: tuple[Any, ...], given: dict[str, Any]) -> TieredCache | None:
    return next((x for x in (*given.values(), *args) if isinstance(x, TieredCache)), None)


def _implementation(decoder: Any) -> str:
    name: str = decoder.config._attn_implementation  # noqa: SLF001 - Transformers has no public way to read it
    return name


def _is_compiled(module: torch.nn.Module) -> bool:
    if isinstance(module, torch._dynamo.OptimizedModule):  # noqa: SLF001 - what torch.compile returns
        return True
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")  # noqa: SLF001
