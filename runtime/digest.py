"""SHA-256 of tensors: of dtype, shape and every byte, wherever they lie."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PIECE_BYTES = 1 << 26  # what is brought to the host at once


def digest(tensor: Tensor) -> str:
    """The hexadecimal digest of a tensor; the same on every device, and for every layout in memory.

    Of a quantised tensor that wraps others, such as torchao's, it covers all of them and their settings. Raises
    ValueError for a tensor whose bytes cannot be read: on the meta device, sparse, or packed by a library.
    """
    summed = sha256(f"{type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)}".encode())
    if is_traceable_wrapper_subclass(tensor):
        names, settings = tensor.__tensor_flatten__()
        summed.update(repr(settings).encode())
        for name in names:
            summed.update(f"{name} {digest(getattr(tensor, name))}".encode())
        return summed.hexdigest()
    if tensor.is_meta:
        raise ValueError("it lies on the meta device: offloaded by another library, or never loaded")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"its bytes cannot be read (layout {tensor.layout}, dtype {tensor.dtype})")
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    for piece in data.split(PIECE_BYTES):
        summed.update(piece.cpu().numpy())
    return summed.hexdigest()


def digests(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The digest of each tensor by name, computed by several threads; what shares its memory is read once.

    Raises ValueError, with the name, where `digest` does.
    """
    tensors = dict(named)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        places = {name: _place(tensor) for name, tensor in tensors.items()}
        running = {place: pool.submit(digest, tensors[name]) for name, place in places.items()}
        summed = {}
        for name, place in places.items():
            try:
                summed[name] = running[place].result()
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise ValueError(f"{name}, a {type(tensors[name]).__name__}, has no digest: {error}") from None
    return summed


def _place(tensor: Tensor) -> tuple[object, ...]:
    if is_traceable_wrapper_subclass(tensor) or tensor.is_meta or tensor.layout is not torch.strided:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), type(tensor)
