"""A built cache in a file: a long prefix is prefilled once, and every later process goes on from it.

The file is safetensors: the arena's buffers of each layer, what Hugging Face's own layers hold, the rotary angles; its
metadata has one JSON text, which says what they belong to.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from policies import describe
from runtime.cache import TieredCache, TieredLayer
from runtime.hybrid import TieredHybridLayer
from runtime.rotary import Rotary

FORMAT = "kvsim-cache-1"  # the key of the metadata


def save_cache(cache: TieredCache, model: Any, path: Path) -> None:
    """Write a cache whose prompt is complete; the file appears when it is whole.

    Raises ValueError when the prompt is not complete, or a layer holds a state that is no keys and values.
    """
    cache.executor.join()
    own: dict[str, Any] = {}
    stock: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, TieredHybridLayer):
            raise ValueError(f"layer {index} keeps a state beside its keys and values, which cannot be saved")
        if isinstance(layer, TieredLayer):
            if not layer.is_initialized or layer.tokens < layer.first_prompt_tokens:
                raise ValueError(f"layer {index} has not finished its prompt; process all of it before saving")
            own[str(index)] = {"tokens": layer.tokens, "prompt_tokens": layer.prompt_tokens}
            tensors |= {f"{index}.{name}": tensor for name, tensor in cache.arena.kept(index).items()}
        elif type(layer) is DynamicSlidingWindowLayer and layer.is_initialized:
            stock[str(index)] = layer.cumulative_length
            tensors |= {f"{index}.keys": layer.keys.contiguous(), f"{index}.values": layer.values.contiguous()}
        else:
            raise ValueError(f"layer {index} is a {type(layer).__name__}, whose state cannot be saved")
    tables = list({id(rotary): rotary for rotary in cache.rotaries.values()}.values())
    for number, rotary in enumerate(tables):
        tensors[f"rotary.{number}.cos"], tensors[f"rotary.{number}.sin"] = rotary.so_far()
    first = cache.layers[cache.own[0]]
    says = {
        **_belongs_to(cache, model),
        "kvsim": _version(),
        "batch": cache.arena.batch,
        "first_prompt_tokens": first.first_prompt_tokens,
        "max_new_tokens": cache.terms.max_new_tokens,
        "own": own,
        "stock": stock,
        "rotary": {str(index): tables.index(rotary) for index, rotary in cache.rotaries.items()},
        "tensors": sorted(tensors),
    }
    unfinished = path.with_name(path.name + ".part")
    save_file(tensors, unfinished, metadata={FORMAT: json.dumps(says)})
    unfinished.replace(path)


def load_cache(cache: TieredCache, model: Any, path: Path) -> None:
    """Fill a new cache with what `save_cache` has written.

    Raises ValueError for a file that is none or not whole, or of another model, policy or dtype, and where the cache is
    to have room for more tokens than the saved one; MemoryError when it does not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(FORMAT)
            if text is None:
                raise ValueError(f"{path}: no saved cache; write one with kv.save(cache, path)")
            says = json.loads(text)
            _check(path, says, _belongs_to(cache, model), cache.terms.max_new_tokens)
            tensors = {name: file.get_tensor(name) for name in says["tensors"]}
    except SafetensorError as error:
        raise ValueError(f"{path}: no saved cache, or not all of it ({error})") from None
    cache.terms = replace(cache.terms, max_new_tokens=says["max_new_tokens"])
    cache.reopen(says["batch"], says["first_prompt_tokens"])
    for index, counted in says["own"].items():
        layer = cache.layers[int(index)]
        layer.tokens, layer.prompt_tokens = counted["tokens"], counted["prompt_tokens"]
        for name, held in cache.arena.kept(int(index)).items():
            held.copy_(tensors[f"{index}.{name}"])
    for index, length in says["stock"].items():
        layer = cache.layers[int(index)]
        keys, values = (tensors[f"{index}.{part}"].to(cache.device) for part in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, length
    tables: dict[int, Rotary] = {}
    for index, number in says["rotary"].items():
        if number not in tables:
            angles = (tensors[f"rotary.{number}.{part}"].to(cache.device) for part in ("cos", "sin"))
            tables[number] = cache.new_rotary(int(index), cache.max_tokens)
            tables[number].restore(*angles)
        cache.rotaries[int(index)] = tables[number]


def _belongs_to(cache: TieredCache, model: Any) -> dict[str, str]:
    shape = cache.terms.shape
    return {
        "dtype": shape.kv_dtype,
        "model": f"{shape.name} ({sha256(repr(shape).encode()).hexdigest()[:12]}, weights {_sampled(model)})",
        "policy": describe(cache.terms.policy),
    }


def _check(path: Path, says: Mapping[str, Any], belongs_to: Mapping[str, str], max_new_tokens: int) -> None:
    for what, here in belongs_to.items():
        if says[what] != here:
            raise ValueError(f"{path} was saved with the {what} {says[what]}, and here it is {here}")
    if says["max_new_tokens"] < max_new_tokens:
        raise ValueError(
            f"{path} has room for {says['max_new_tokens']} tokens after the prompt, and {max_new_tokens} are wanted; "
            f"use offload(..., max_new_tokens={says['max_new_tokens']}) or save it with more"
        )


def _sampled(model: Any) -> str:
    """A digest of some numbers of every weight, in fp32: enough to tell one checkpoint from another."""
    digest = sha256()
    for name, weight in model.named_parameters():
        some = weight.detach().flatten()[:: max(1, weight.numel() // 16)]
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(some.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:12]


def _version() -> str:
    try:
        return version("kvsim")
    except PackageNotFoundError:  # run from its sources
        return "unknown"
