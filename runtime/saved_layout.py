"""Which tensors a saved cache has, of which shapes and dtypes; a file is compared with it before it is loaded."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from policies.shown import shown
from runtime.arena import DTYPES
from runtime.cache import TieredCache
from runtime.call import Method
from runtime.hybrid import TieredHybridLayer
from runtime.layer import TieredLayer
from runtime.rotary import UNROTATED
from runtime.saved_header import Header

NAMES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


class Expected(NamedTuple):
    """A tensor of the file: where `shape` has None, any size will do."""

    shape: tuple[int | None, ...]
    dtypes: tuple[torch.dtype, ...]
    may_be_infinite: bool = False


def keeps_angles(cache: TieredCache, index: int, method: Method) -> bool:
    """Whether a table of angles is part of a layer's state: where keys are turned back that were rotated at all."""
    return method.unrotates and cache.terms.seen[index].rotation not in (None, UNROTATED)


def layers_of(cache: TieredCache) -> Iterator[TieredLayer | DynamicSlidingWindowLayer]:
    """The layers of a cache in turn; ValueError at the first whose state cannot be saved."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, TieredHybridLayer):
            raise ValueError(f"layer {index} keeps a state beside its keys and values, which cannot be saved")
        if isinstance(layer, TieredLayer) or type(layer) is DynamicSlidingWindowLayer:
            yield layer
        else:
            raise ValueError(f"layer {index} is a {type(layer).__name__}, whose state cannot be saved")


def expected_of(cache: TieredCache, header: Header) -> dict[str, Expected]:
    """Every tensor that a cache of this header has; ValueError where the header contradicts itself or the model."""
    batch, tokens, shape = header.batch, header.tokens, cache.terms.shape
    first, last = header.first_prompt_tokens, max(header.prompt_tokens.values(), default=0)
    room = first + header.max_new_tokens
    if not max(first, last) <= tokens <= min(room, shape.max_positions):
        raise ValueError(f"says that it holds {tokens} tokens, {max(first, last)} of them prompt, in a room for {room}")
    settled = cache.settled(first)
    if {*header.prompt_tokens} != {*settled}:
        raise ValueError(
            f"has the layers {shown(sorted(header.prompt_tokens))}, and here {sorted(settled)} keep tokens"
        )
    if {*header.rotary} != {index for index, (method, _) in settled.items() if keeps_angles(cache, index, method)}:
        raise ValueError(f"has rotary angles for the layers {shown(sorted(header.rotary))}, which are not those here")
    tables = {*header.rotary.values()}
    if tables != {*range(len(tables))}:
        raise ValueError(f"numbers its {len(tables)} tables of rotary angles {shown(sorted(tables))}")
    expected = {
        f"{index}.{buffer.name}": Expected(
            (batch, buffer.rows, *buffer.row_shape), (DTYPES[buffer.dtype],), buffer.name in method.may_be_infinite
        )
        for index, (method, buffers) in settled.items()
        for buffer in buffers
        if not (buffer.view or buffer.ring)
    }
    for index, layer in enumerate(layers_of(cache)):
        if not isinstance(layer, TieredLayer):
            heads = shape.layers[index]
            window = min(tokens, layer.sliding_window - 1)
            for part, width in (("keys", heads.head_dim), ("values", heads.v_head_dim)):
                expected[f"{index}.{part}"] = Expected(
                    (batch, heads.kv_heads, window, width), (DTYPES[shape.kv_dtype],)
                )
    for number in tables:
        angles = Expected((None, tokens, None), (torch.float32, DTYPES[shape.kv_dtype]))
        expected |= {f"rotary.{number}.cos": angles, f"rotary.{number}.sin": angles}
    expected["real"] = Expected((batch, tokens), (torch.bool,))
    if header.bound:
        expected["ids"] = Expected((batch, tokens), (torch.int64,))
    return expected


def check_layout(file: Any, header: Header, expected: Mapping[str, Expected], widest: int) -> None:
    """Compare names, shapes and dtypes, before anything is allocated."""
    there = {*file.keys()}
    if odd := sorted({*expected} ^ there) or sorted({*expected} ^ {*header.digests}):
        raise ValueError(f"{'has the unknown' if odd[0] not in expected else 'lacks the'} tensor {shown(odd[0])}")
    for name, each in expected.items():
        part = file.get_slice(name)
        check_kind(name, tuple(part.get_shape()), NAMES.get(part.get_dtype()), each)
    for number in {*header.rotary.values()}:
        shapes = {tuple(file.get_slice(f"rotary.{number}.{part}").get_shape()) for part in ("cos", "sin")}
        batch, _, width = shapes.pop()
        if shapes or batch not in (1, header.batch) or width not in range(2, widest + 1, 2):
            raise ValueError(f"has rotary angles for {batch} sequences and {width} dimensions of a head")


def check_kind(name: str, shape: tuple[int, ...], dtype: torch.dtype | None, expected: Expected) -> None:
    """Raise ValueError, naming both, where a tensor has another shape or dtype than is expected of it."""
    same = len(shape) == len(expected.shape) and all(a in (b, None) for a, b in zip(expected.shape, shape, strict=True))
    if not same or dtype not in expected.dtypes:
        raise ValueError(
            f"has the tensor {name} of shape {shown(shape)} and {dtype}, where {expected.shape} is kept of it"
        )
