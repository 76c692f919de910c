"""`cudaMemcpyBatchAsync`, which torch does not wrap: many pieces in one call of the CUDA runtime."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

_IN_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Attributes(ctypes.Structure):
    _fields_ = [
        ("order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    ]


def batched_copy() -> Callable[[list[Tensor], list[Tensor]], Callable[[], None]] | None:
    """A maker of launches of batched copies on the current stream; None before CUDA 12.8, which has no such call."""
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if version < (12, 8):
        return None
    try:
        library = ctypes.CDLL(f"libcudart.so.{version[0]}")  # torch has loaded it
        call = library.cudaMemcpyBatchAsync
    except (OSError, AttributeError):
        return None
    call.restype = ctypes.c_int

    def batch(targets: list[Tensor], sources: list[Tensor]) -> Callable[[], None]:
        n = len(targets)
        target_ptrs = (ctypes.c_void_p * n)(*(one.data_ptr() for one in targets))
        source_ptrs = (ctypes.c_void_p * n)(*(one.data_ptr() for one in sources))
        sizes = (ctypes.c_size_t * n)(*(one.numel() * one.element_size() for one in sources))
        attributes, first = (_Attributes * 1)(_Attributes(order=_IN_STREAM_ORDER)), (ctypes.c_size_t * 1)(0)
        failed = ctypes.c_size_t(0)
        index = (ctypes.byref(failed),) if version < (13, 0) else ()  # CUDA 13 has dropped it

        def launch() -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            code = call(
                target_ptrs, source_ptrs, sizes, ctypes.c_size_t(n), attributes, first, ctypes.c_size_t(1), *index,
                stream,
            )  # fmt: skip
            if code:
                raise RuntimeError(f"cudaMemcpyBatchAsync failed with CUDA error {code}")

        return launch

    return batch
