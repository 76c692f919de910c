"""A built cache in a file: a long prefix is prefilled once, and every later process goes on from it.

The file is safetensors: the arena's buffers of each layer, what Hugging Face's own layers hold, the rotary angles, and
the token ids; its metadata has one JSON text, which says what they belong to (`runtime.saved_header`). It is bound to
the model as it computed, to the policy, to the ids, and to its own bytes, by SHA-256; it is not signed.
"""

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from policies import describe
from policies.shown import shown
from runtime.aside import written_aside
from runtime.cache import TieredCache
from runtime.digest import digest, digests
from runtime.fingerprint import fingerprint
from runtime.layer import TieredLayer
from runtime.rotary import Rotary
from runtime.saved_header import Header, read_header
from runtime.saved_layout import Expected, check_kind, check_layout, expected_of, keeps_angles, layers_of

MOST_HEADER_BYTES = 1 << 25  # what a header of 400 layers takes is a hundredth of it


def save_cache(cache: TieredCache, model: Any, path: Path, *, unbound: bool) -> None:
    """Write a cache whose prompt is complete; the file appears when it is whole, and a failure leaves the old one.

    `unbound`: without the token ids. Raises ValueError when the prompt is not complete, the cache was given back, a
    layer holds a state that is no keys and values, a number is NaN or infinite, ids were never heard, or weights cannot
    be read; OSError when the file cannot be written.
    """
    cache.check_usable()
    cache.steps.executor.settle()
    tokens = _tokens(cache)
    layers = {index: cache.tiered(index) for index in cache.own}
    first = layers[cache.own[0]]
    rotaries = {
        index: cache.rotaries.of[index] for index, layer in layers.items() if keeps_angles(cache, index, layer.method)
    }
    tables = list({id(rotary): rotary for rotary in rotaries.values()}.values())
    held = _held(cache, tables)
    ids = None if unbound else cache.heard.ids(tokens)
    if ids is not None:
        held["ids"] = ids
    elif not unbound:
        raise ValueError(
            "the cache holds tokens whose ids were never heard (embeddings, images, or more than a 2-D mask says), so "
            "that a file of it could be taken up behind another prompt; kv.save(..., unbound=True) does write it"
        )
    header = Header(
        written_by=", ".join(f"{name} {_version(name)}" for name in ("kvsim", "torch", "transformers")),
        policy=describe(cache.terms.policy),
        dtype=cache.terms.shape.kv_dtype,
        fingerprint=fingerprint(model),
        batch=cache.arena.batch,
        tokens=tokens,
        first_prompt_tokens=first.first_prompt_tokens,
        max_new_tokens=cache.terms.max_new_tokens,
        prompt_tokens={index: layer.prompt_tokens for index, layer in layers.items()},
        rotary={index: tables.index(rotary) for index, rotary in rotaries.items()},
        bound=ids is not None,
        beyond=cache.beyond,
        digests={},
    )
    expected = expected_of(cache, header)
    held = {name: tensor.cpu() for name, tensor in held.items()}
    for name, tensor in held.items():
        check_kind(name, tuple(tensor.shape), tensor.dtype, expected[name])
        _check_numbers(name, tensor, expected[name])
    with written_aside(path) as new:
        try:
            save_file(held, new, metadata=replace(header, digests=digests(held.items())).metadata())
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error})") from None


def load_cache(cache: TieredCache, model: Any, path: Path, *, unbound: bool) -> None:
    """Fill a new cache with what `save_cache` has written.

    Raises ValueError for a file that is none, not whole, damaged, or of another model, policy or dtype, and where the
    cache is to have room for more tokens than the saved one, or is not `unbound` and the file has no ids;
    FileNotFoundError when there is none, MemoryError when it does not fit.
    """
    with _opened(path) as file:
        header = read_header(file.metadata() or {})
        _check_terms(cache, header, unbound)
        here = fingerprint(model)
        if difference := header.fingerprint.difference(here):
            there = shown(str(header.fingerprint))[1:-1]
            raise ValueError(f"was saved with the model {there}, and here it is {here}: {difference}")
        cache.terms = replace(cache.terms, max_new_tokens=header.max_new_tokens)
        expected = expected_of(cache, header)
        check_layout(file, header, expected, max(layer.head_dim for layer in cache.terms.shape.layers))
        with cache.at_work():
            cache.reopen(header.batch, header.first_prompt_tokens)
            try:
                _fill(cache, header, lambda name: _taken(file, header, name, expected[name]))
            except BaseException:
                cache.release()
                raise
    if unbound:
        cache.heard.forget()


def _tokens(cache: TieredCache) -> int:
    """How many tokens every layer holds; ValueError where they differ, or are none, or the state is of another kind."""
    if not cache.own:
        raise ValueError("no layer of this model keeps its cache under a policy, so that there is nothing to save")
    counts = set()
    for index, layer in enumerate(layers_of(cache)):
        if isinstance(layer, TieredLayer):
            if not layer.is_initialized or layer.tokens < layer.first_prompt_tokens:
                raise ValueError(f"layer {index} has not finished its prompt; process all of it before saving")
            counts.add(layer.tokens)
        else:
            counts.add(layer.cumulative_length)
    if cache.arena.batch == 0:
        raise ValueError("the cache was given back when its context ended; call kv.save inside `with offload(...)`")
    if len(counts) > 1:
        raise ValueError(
            f"the layers hold from {min(counts)} to {max(counts)} tokens: a forward broke off; build it anew"
        )
    return counts.pop()


def _held(cache: TieredCache, tables: list[Rotary]) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for index, layer in enumerate(layers_of(cache)):
        if isinstance(layer, TieredLayer):
            held |= {f"{index}.{name}": tensor for name, tensor in cache.arena.kept(index).items()}
        else:
            for part, tensor in (("keys", layer.keys), ("values", layer.values)):
                if tensor is None:
                    raise ValueError(f"layer {index} holds no {part}; process a prompt before saving")
                held[f"{index}.{part}"] = tensor.contiguous()
    held["real"] = cache.real
    for number, rotary in enumerate(tables):
        held[f"rotary.{number}.cos"], held[f"rotary.{number}.sin"] = rotary.so_far()
    return held


def _check_terms(cache: TieredCache, header: Header, unbound: bool) -> None:
    terms = cache.terms
    for what, there, here in (
        ("dtype", header.dtype, terms.shape.kv_dtype),
        ("policy", header.policy, describe(terms.policy)),
    ):
        if there != here:
            raise ValueError(f"was saved with the {what} {shown(there)[1:-1]}, and here it is {here}")
    if header.max_new_tokens < terms.max_new_tokens:
        raise ValueError(
            f"has room for {header.max_new_tokens} tokens after the prompt, and {terms.max_new_tokens} are wanted; "
            f"use offload(..., max_new_tokens={header.max_new_tokens}) or save it with more"
        )
    if not (header.bound or unbound):
        raise ValueError(
            "was saved without token ids, so that nothing tells its prompt; use kv.load(..., unbound=True)"
        )


def _taken(file: Any, header: Header, name: str, expected: Expected) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if digest(tensor) != header.digests[name]:
        raise ValueError(f"is damaged: {name} is not what was saved; save the cache again")
    _check_numbers(name, tensor, expected)
    return tensor


def _check_numbers(name: str, tensor: Tensor, expected: Expected) -> None:
    for piece in tensor.reshape(-1).split(1 << 24) if tensor.is_floating_point() else ():
        if piece.isnan().any() or not (expected.may_be_infinite or piece.isfinite().all()):
            raise ValueError(f"{name} of the cache has numbers that are NaN or infinite; nothing can go on from it")


def _fill(cache: TieredCache, header: Header, taken: Callable[[str], Tensor]) -> None:
    for index, layer in enumerate(layers_of(cache)):
        if isinstance(layer, TieredLayer):
            layer.tokens, layer.prompt_tokens = header.tokens, header.prompt_tokens[index]
            for name, held in cache.arena.kept(index).items():
                held.copy_(taken(f"{index}.{name}"))
        else:
            keys, values = (taken(f"{index}.{part}").to(cache.device, copy=True) for part in ("keys", "values"))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, header.tokens
    tables: dict[int, Rotary] = {}
    for index, number in header.rotary.items():
        if number not in tables:
            angles = (taken(f"rotary.{number}.{part}").to(cache.device) for part in ("cos", "sin"))
            tables[number] = cache.rotaries.new(index, min(cache.max_tokens, cache.terms.shape.max_positions))
            tables[number].restore(*angles)
        cache.rotaries.of[index] = tables[number]
    cache.real = taken("real").to(cache.device)
    cache.beyond = header.beyond
    if header.bound:
        cache.heard.restore(taken("ids").to(cache.device), cache.real)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, mapped into memory; whatever is wrong with it, or found to be inside, is a ValueError with its path."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no saved cache, and no file either; name what kv.save(cache, path) wrote")
        with path.open("rb") as start:
            header_bytes = int.from_bytes(start.read(8), "little")
        if status.st_size < 8 or header_bytes > min(status.st_size - 8, MOST_HEADER_BYTES):
            raise ValueError(f"no saved cache, or not all of it ({status.st_size:,} bytes)")
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: no saved cache, or not all of it ({shown(str(error))[1:-1]})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from its sources
        return "unknown"
