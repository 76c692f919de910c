"""Row gathers between memories: each row is named on the device, read where it lies and written to its slot."""

import torch
from torch import Tensor


def gather_rows(src: Tensor, ids: Tensor, dst: Tensor, slots: Tensor, counter: Tensor) -> None:
    """Copy `src[b, h, ids[b, h, i]]` to `dst[b, h, slots[b, h, i]]`, and add the rows copied to `counter`.

    src `(batch, kv_heads, rows, width)` may lie in pinned host memory while all others are on the GPU: the kernel
    then reads over the bus just the rows that are named (zero-copy). dst `(batch, kv_heads, slots, width)`; ids and
    slots `(batch, kv_heads, n)`, where id -1 skips; the slots of a head differ. A row of several tokens is a row of
    `width = chunk_tokens * head_dim`. counter: one int64 element on dst's device.
    Raises ValueError for shapes or dtypes that do not fit, and for pageable host memory.
    """
    _check(src, ids, dst, slots, counter)
    if ids.numel() == 0:
        return
    if dst.is_cuda:
        if not src.is_cuda and not src.is_pinned():
            raise ValueError("src is in pageable host memory, which a GPU cannot read; use pin_memory=True")
        from runtime.kernels.gather_triton import copy_rows

        copy_rows(src, ids, dst, slots, counter)
        return
    _copy_rows_eager(src, ids, dst, slots, counter)


def _copy_rows_eager(src: Tensor, ids: Tensor, dst: Tensor, slots: Tensor, counter: Tensor) -> None:
    # A CPU may look at the ids: they stay where they are, and what crosses is the rows that they name.
    ids, slots = torch.tensor(ids.tolist()), torch.tensor(slots.tolist())
    row, head, at = (ids >= 0).nonzero(as_tuple=True)
    dst[row, head, slots[row, head, at]] = src[row, head, ids[row, head, at]]
    counter += len(at)


def _check(src: Tensor, ids: Tensor, dst: Tensor, slots: Tensor, counter: Tensor) -> None:
    shapes = f"src {tuple(src.shape)}, dst {tuple(dst.shape)}, ids {tuple(ids.shape)}, slots {tuple(slots.shape)}"
    if src.dim() != 4 or dst.dim() != 4 or src.shape[:2] != dst.shape[:2] or src.shape[3] != dst.shape[3]:
        raise ValueError(f"src and dst must be (batch, kv_heads, rows, width), equal but for their rows; got {shapes}")
    if ids.dim() != 3 or ids.shape != slots.shape or ids.shape[:2] != src.shape[:2]:
        raise ValueError(f"ids and slots must both be (batch, kv_heads, n); got {shapes}")
    if src.dtype != dst.dtype:
        raise ValueError(f"src is {src.dtype} and dst {dst.dtype}; a gather does not convert")
    if src.stride(3) != 1 or dst.stride(3) != 1:
        raise ValueError("a row of src and of dst must be contiguous")
    if counter.dtype != torch.int64 or counter.numel() != 1:
        raise ValueError(f"counter must be one int64 element, but is {counter.dtype} of {counter.numel()}")
