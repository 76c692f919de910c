"""Operations of plans as a serving engine's kernels run them: a start, and a time for each FLOP and each byte.

A batch's amounts are sums over its sequences, and runs of steps have a closed form where times are linear in them, so
each kernel's price is replaced by the line that is nearest to it in relative terms, over the sizes that serving meets.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.kernels.attention import attention_bytes, attention_flops
from kvsim.hardware.kernels.chip import KV_DTYPES
from kvsim.hardware.kernels.prices import Kernels
from kvsim.hardware.rates import Rates
from kvsim.hardware.served import ServedModel
from policies.layer import LayerShape
from policies.plan import Work

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS = (256, 1024, 4096, 16384, 65536)
_MOST_TOKENS = 1 << 21  # of a batch's contexts: what caches hold
_PROMPTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_CACHED = (0, 2048, 16384, 131072)
_SPAN_BYTES = 1 << 36  # of the pinned memory that caches of many sequences lie in


class Line(NamedTuple):
    """Seconds before anything is done, of a FLOP (or an element searched), and of a byte that streams meanwhile.

    `walked_s` is what arithmetic takes longer for each byte: blocks of queries walk over all keys, tile after tile.
    """

    start_s: float
    work_s: float
    byte_s: float
    walked_s: float = 0.0


class AttentionLines(NamedTuple):
    """Attention of decode steps and of prompts."""

    decode: Line
    prefill: Line


class ServedOperations:
    """What kinds of operations take on one GPU."""

    def __init__(self, served: ServedModel, rates: Rates) -> None:
        self._served, self._kernels, self._rates = served, served.kernels, rates
        self._attention: dict[tuple[int, int, int, str], AttentionLines] = {}

    def line(self, work: Work, layer: LayerShape, kv_dtype: str, *, prefill: bool) -> Line:
        """Of one kernel on the SMs, in a step of a prompt or in one that decodes."""
        served = self._served
        if work is Work.ATTENTION and layer.kind != "linear":
            lines = self.attention(layer, kv_dtype)
            return lines.prefill if prefill else lines.decode
        if work in (Work.ATTENTION, Work.MATMUL):
            product = served.sustained("bf16", "bf16")
            return Line(product.start_s, product.flop_s, product.byte_s)
        if work is Work.NEAREST:
            return self.nearest
        start_s, byte_s, rates = served.elementwise_start_s, served.elementwise_byte_s, self._rates
        if work is Work.TOPK:
            return Line(start_s, 1 / rates.topk_elements_per_s, byte_s)
        return Line(start_s, 1 / rates.product_flops("fp32"), byte_s)

    def attention(self, layer: LayerShape, kv_dtype: str) -> AttentionLines:
        """Of a layer's attention over keys and values stored in `kv_dtype`."""
        kv_dtype = kv_dtype if kv_dtype in KV_DTYPES else "bf16"
        key = layer.heads, layer.kv_heads, layer.latent_dim or layer.head_dim + layer.v_head_dim, kv_dtype
        if key not in self._attention:
            heads, kv_heads, row_elements, _ = key
            decode = _decode_line(self._kernels, (heads, kv_heads, max(1, row_elements // 2)), kv_dtype)
            head_dim = (layer.head_dim + layer.v_head_dim) // 2
            shape = heads, heads if layer.latent_dim else kv_heads, max(1, head_dim)
            start_s, flop_s, walked_s = _prefill_line(self._kernels, shape, kv_dtype)
            prefill = Line(start_s, flop_s, decode.byte_s, walked_s)
            self._attention[key] = AttentionLines(decode._replace(work_s=flop_s), prefill)
        return self._attention[key]

    def copy(self, row_bytes: int, *, rows_apart: bool, to_hbm: bool) -> tuple[float, float]:
        """Of a batched copy: seconds before its first byte, and of each; rows that lie apart have descriptors."""
        price = self._kernels.copy_s
        start_s, large = price(nbytes=1, to_hbm=to_hbm), 1 << 30
        byte_s = (price(nbytes=large, to_hbm=to_hbm) - start_s) / large
        if not rows_apart:
            return start_s, byte_s
        descriptor_s = (price(nbytes=1, descriptors=1001, to_hbm=to_hbm) - start_s) / 1000
        return start_s, max(byte_s, descriptor_s / row_bytes)

    def gather(self, row_bytes: int) -> tuple[float, float]:
        """The same of a kernel that reads rows of host memory at indices that data decide."""
        start_s, rows = self._kernels.gather_s(rows=1, row_bytes=1, span_bytes=1), 1 << 20
        seconds = self._kernels.gather_s(rows=rows, row_bytes=row_bytes, span_bytes=_SPAN_BYTES)
        return start_s, (seconds - start_s) / (rows * row_bytes)

    @cached_property
    def nearest(self) -> Line:
        """Products of which the largest of each row count: clusterings, and graphs of neighbours."""
        start_s, points = self._kernels.neighbours_s(heads=1, queries=1, keys=1, head_dim=1), 1 << 16
        seconds = self._kernels.neighbours_s(heads=1, queries=points, keys=points, head_dim=128)
        return Line(start_s, (seconds - start_s) / (2 * points**2 * 128), self._served.elementwise_byte_s)


def _decode_line(kernels: Kernels, shape: tuple[int, int, int], kv_dtype: str) -> Line:
    heads, kv_heads, head_dim = shape
    cases = [(batch, tokens) for batch in _BATCHES for tokens in _CONTEXTS if batch * tokens <= _MOST_TOKENS]
    seconds = [
        kernels.decode_attention_s(
            batch=batch, context_tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, kv_dtype=kv_dtype
        )
        for batch, tokens in cases
    ]
    nbytes = [attention_bytes(kv_dtype, batch, 1, tokens - 1, *shape) for batch, tokens in cases]
    start_s, byte_s = _nearest_line(seconds, [1.0] * len(cases), nbytes)
    return Line(start_s, 0.0, max(byte_s, 1 / kernels.chip.hbm_Bps))


def _prefill_line(kernels: Kernels, shape: tuple[int, int, int], kv_dtype: str) -> tuple[float, float, float]:
    """Seconds before anything is done, of a FLOP, and of a byte."""
    heads, kv_heads, head_dim = shape
    cases = [(tokens, cached) for tokens in _PROMPTS for cached in _CACHED]
    seconds = [
        kernels.prefill_attention_s(
            batch=1, tokens=tokens, cached_tokens=cached, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            kv_dtype=kv_dtype,
        )
        for tokens, cached in cases
    ]  # fmt: skip
    flops = [float(attention_flops(1, tokens, cached, heads, head_dim)) for tokens, cached in cases]
    nbytes = [attention_bytes(kv_dtype, 1, tokens, cached, *shape) for tokens, cached in cases]
    start_s, flop_s, byte_s = _nearest_line(seconds, [1.0] * len(cases), flops, nbytes)
    return start_s, max(flop_s, 1 / kernels.chip.half_flops), byte_s


def _nearest_line(seconds: Sequence[float], *columns: Sequence[float]) -> list[float]:
    """Factors of the columns, none negative, whose sum has the least squares of relative errors."""
    weights = 1 / np.array(seconds)
    rows: NDArray[np.float64] = np.array(columns).T * weights[:, None]
    kept = list(range(len(columns)))
    while True:
        scale = np.abs(rows[:, kept]).max(axis=0)
        factors = np.linalg.lstsq(rows[:, kept] / scale, np.ones(len(rows)), rcond=None)[0] / scale
        if factors.min() >= 0:
            found = [0.0] * len(columns)
            for column, factor in zip(kept, factors.tolist(), strict=True):
                found[column] = factor
            return found
        kept.pop(int(factors.argmin()))
