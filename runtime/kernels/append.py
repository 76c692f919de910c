"""A step's new key and value put behind those of a cache, at a row that the device knows."""

import torch
from torch import Tensor


def append_row(keys: Tensor, values: Tensor, new_k: Tensor, new_v: Tensor, row: Tensor) -> None:
    """Write `new_k` and `new_v`, (batch, kv_heads, 1, head_dim), to row `row` of each head of `keys` and `values`.

    keys and values (batch, kv_heads, rows, head_dim), any strides but for the last; row, int64 (1,) on their device, is
    read where the kernel runs, so that a captured launch serves every length. It must be a row that there is: what a
    device does with another is undefined.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    for held, new in ((keys, new_k), (values, new_v)):
        if new.dim() != 4 or new.shape[2] != 1 or held.dim() != 4 or held.shape[::3] != new.shape[::3]:
            raise ValueError(
                f"a new row {tuple(new.shape)} must be (batch, kv_heads, 1, head_dim) of {tuple(held.shape)}"
            )
        if held.shape[1] != new.shape[1] or held.dtype != new.dtype:
            raise ValueError(
                f"a row of {new.shape[1]} heads in {new.dtype} does not fit {held.shape[1]} heads in {held.dtype}"
            )
    if row.dtype != torch.int64 or row.numel() != 1:
        raise ValueError(f"row must be one int64 element, but is {row.dtype} of {row.numel()}")
    if keys.is_cuda:
        from runtime.kernels.append_triton import write_row

        write_row(keys, values, new_k, new_v, row)
        return
    keys.index_copy_(2, row, new_k)
    values.index_copy_(2, row, new_v)
