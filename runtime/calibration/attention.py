"""Attention of prompts and of decode steps by shape: the quicker of the flash kernels that torch has, forced."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.calibration.timing import Clock, Measurement, Timing

HEAD_DIM = 128
HEADS = [(32, 8), (64, 8), (8, 1), (16, 2), (32, 32), (28, 4), (40, 8), (16, 4), (8, 8)]
"""(heads, kv_heads) of models and of their shards."""

PREFILL_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PREFILL_BATCHES = (1, 4)
MOST_FLOPS = 3_000_000_000_000
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
POOL_ELEMENTS = 1 << 31
PREFILL_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
DECODE_BACKENDS = (SDPBackend.FLASH_ATTENTION,)  # cuDNN plans a fifth of a second for each new shape


def prefills(clock: Clock, every: int) -> Iterator[Measurement]:
    """Causal attention over whole prompts, not more than some 3 TFLOP at once; each `every`th pair of heads."""
    pool = _pool()
    for heads, kv_heads in HEADS[::every]:
        for batch in PREFILL_BATCHES:
            for tokens in PREFILL_TOKENS:
                if 2 * batch * heads * HEAD_DIM * tokens**2 > MOST_FLOPS:
                    continue
                shape = {"batch": batch, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM}
                timing = _attended(clock, pool, batch, tokens, tokens, heads, kv_heads)
                yield Measurement("prefill_attention", "bf16", shape, *timing)


def decodes(clock: Clock, every: int) -> Iterator[Measurement]:
    """One new token a sequence over caches of up to 4 GiB; each `every`th pair of heads."""
    pool = _pool()
    for heads, kv_heads in HEADS[::every]:
        for batch in DECODE_BATCHES:
            for tokens in CONTEXTS:
                if 2 * batch * kv_heads * HEAD_DIM * tokens > POOL_ELEMENTS // 2:
                    continue
                timing = _attended(clock, pool, batch, 1, tokens, heads, kv_heads)
                shape = {"batch": batch, "context_tokens": tokens, "heads": heads, "kv_heads": kv_heads}
                yield Measurement("decode_attention", "bf16", shape | {"head_dim": HEAD_DIM}, *timing)


def _pool() -> Tensor:
    return torch.empty(POOL_ELEMENTS, dtype=torch.bfloat16, device="cuda").normal_()


def _attended(clock: Clock, pool: Tensor, batch: int, queries: int, tokens: int, heads: int, kv_heads: int) -> Timing:
    """The quickest backend's time; ValueError where torch has none for this GPU."""
    elements = batch * kv_heads * tokens * HEAD_DIM
    l2_bytes = 2 * torch.cuda.get_device_properties().L2_cache_size
    sets = min(32, l2_bytes // (4 * elements) + 1, len(pool) // (2 * elements))
    caches = pool[: 2 * sets * elements].view(sets, 2, batch, kv_heads, tokens, HEAD_DIM)
    q = torch.empty(batch, heads, queries, HEAD_DIM, dtype=torch.bfloat16, device="cuda").normal_()
    attend = partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=queries > 1, enable_gqa=heads > kv_heads
    )
    launches = [partial(attend, q, keys, values) for keys, values in caches]
    found: list[Timing] = []
    for backend in PREFILL_BACKENDS if queries > 1 else DECODE_BACKENDS:
        with sdpa_kernel(backend):
            try:
                launches[0]()
            except RuntimeError:  # torch's word for a backend that does not take this shape or GPU
                continue
            found.append(clock.graph_timing(launches))
    if not found:
        raise ValueError("this GPU runs none of torch's flash attention kernels, so its attention cannot be measured")
    return min(found)
