"""Low-rank keys: one decomposition over all heads of a layer, and rows rebuilt from it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from runtime.kernels.gather import gather_rows
from runtime.kernels.select import NONE, token_ids
from runtime.rotary import rotate

BLOCK_TOKENS = 8192  # rows of the Gram matrix's sum that are held in fp32 at once


def decompose(keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` product for the keys of all heads side by side: `(u, sv)` in the dtype of `keys`.

    keys `(batch, kv_heads, tokens, head_dim)`, before RoPE (ShadowKV, Sun et al. 2024, section 4). u `(batch, tokens,
    rank)` is shared by the heads, sv `(batch, kv_heads, rank, head_dim)`; u @ sv is the truncated SVD. Unlike the
    paper's, u carries the singular values: it is the keys projected on the right singular vectors, so nothing is
    divided by a small one. These are the eigenvectors of the Gram matrix (kv_heads * head_dim wide), in fp64.
    Raises ValueError unless 1 <= rank <= min(tokens, kv_heads * head_dim).
    """
    batch, kv_heads, tokens, head_dim = keys.shape
    width = kv_heads * head_dim
    if not 1 <= rank <= min(tokens, width):
        raise ValueError(f"rank={rank} must lie between 1 and {min(tokens, width)} for {tokens} x {width} keys")
    gram = torch.zeros(batch, width, width, dtype=torch.float64, device=keys.device)
    for rows in keys.split(BLOCK_TOKENS, dim=2):
        gram += _gram(rows.transpose(1, 2).flatten(2))
    # Eigenvalues ascend, so the leading vectors stand last.
    basis = torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1).float()
    u = torch.cat([(block @ basis).to(keys.dtype) for block in _blocks(keys)], dim=1)
    sv = basis.unflatten(1, (kv_heads, head_dim)).mT
    return u, sv.to(keys.dtype).contiguous()


def rebuild(u: Tensor, sv: Tensor, ids: Tensor) -> Tensor:
    """The keys of the tokens `ids`, before RoPE: `(batch, kv_heads, n, head_dim)` in the dtype of `sv`.

    u `(batch, tokens, rank)`, sv `(batch, kv_heads, rank, head_dim)`, ids `(batch, kv_heads, n)`; id -1 gives zeros.
    """
    batch, kv_heads, n = ids.shape
    rows = ids.clamp(min=0).reshape(batch, kv_heads * n, 1).expand(-1, -1, u.shape[2])
    chosen: Tensor = u.gather(1, rows).unflatten(1, (kv_heads, n))
    return (chosen @ sv).masked_fill((ids < 0)[..., None], 0)


def rebuild_chunks(
    u: Tensor,
    sv: Tensor,
    angles: tuple[Tensor, Tensor],
    ids: Tensor,
    dst: Tensor,
    slots: Tensor,
    *,
    chunk_tokens: int,
    pairs: bool,
) -> None:
    """Put the keys of chunk `ids[b, h, i]`, rebuilt and rotated, into `dst[b, h, slots[b, h, i]]`.

    u, sv as in `rebuild`; `angles` are cosines and sines of all tokens, (batch or 1, tokens, rotated dimensions); ids
    and slots (batch, kv_heads, n), id -1 = none; dst (batch, kv_heads, slots, chunk_tokens * head_dim), rows
    contiguous. `pairs`: neighbours are rotated, not halves.
    """
    cos, sin = angles
    if dst.is_cuda and not pairs and cos.shape[2] == sv.shape[3] and not cos.shape[2] % 2:
        from runtime.kernels.lowrank_triton import rebuild_halves

        rebuild_halves(u, sv, cos, sin, ids, dst, slots, chunk_tokens)
        return
    tokens = token_ids(ids, chunk_tokens)
    row = torch.arange(len(ids), device=ids.device).clamp(max=len(cos) - 1)[:, None, None]
    at = tokens.clamp(min=0)
    keys = rotate(rebuild(u, sv, tokens), cos[row, at], sin[row, at], pairs=pairs)
    keys = keys.unflatten(2, (-1, chunk_tokens)).flatten(3)
    rows = torch.where(ids < 0, NONE, torch.arange(ids.shape[2], device=ids.device))
    uncounted = torch.zeros(1, dtype=torch.int64, device=ids.device)  # these rows do not change their memory
    gather_rows(keys, rows, dst, slots, uncounted)


def _gram(rows: Tensor) -> Tensor:
    """`rows.mT @ rows` in fp32, rows (batch, tokens, width); products of 16-bit numbers are exact in it."""
    if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(rows.mT, rows, out_dtype=torch.float32)
    wide = rows.float()
    return wide.mT @ wide


def _blocks(keys: Tensor) -> Iterator[Tensor]:
    """The heads side by side in fp32, some tokens at a time: (batch, tokens, kv_heads * head_dim)."""
    return (block.transpose(1, 2).flatten(2).float() for block in keys.split(BLOCK_TOKENS, dim=2))
