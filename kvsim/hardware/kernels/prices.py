"""The price of each kernel on a GPU: `load_gpu(name).kernels`, checked arguments in, seconds out."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.kernels.attention import attention_bytes, attention_flops
from kvsim.hardware.kernels.chip import GEMM_DTYPES, KV_DTYPES, Chip, element_bytes
from kvsim.hardware.kernels.experts import routed
from kvsim.hardware.kernels.fitted import FittedPrices
from kvsim.hardware.kernels.gemm import gemm_bytes
from kvsim.hardware.kernels.rated import RatedPrices
from policies.shown import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Seconds of one kernel each, alone on one GPU; none is faster than the datasheet allows.

    Sizes are whole numbers of elements, tokens or bytes. All methods raise ValueError for a size below 1 and for an
    unknown dtype, whose message names the known ones.
    """

    chip: Chip
    prices: FittedPrices | RatedPrices

    @property
    def fitted(self) -> bool:
        """Whether constants of each kernel are known, not only a parameter set's rates."""
        return isinstance(self.prices, FittedPrices)

    def gemm_s(
        self, *, m: int, n: int, k: int, dtype: str, product: str | None = None, captured: bool = False
    ) -> float:
        """Time of (m, k) activations times (k, n) weights stored in `dtype`.

        `fp8` has one scale a tensor, `fp8_block` one a block; both quantise the activations first. A format that the
        GPU does not multiply in is widened to 16 bits as it streams; so is one whose `product` says bf16 or fp16, as
        of weights that are quantised alone. The tables of block-wise fp8 were measured with kernels that the host
        launches one by one, which small batches wait for; `captured` leaves that out, as in a CUDA graph.
        """
        _sizes(m=m, n=n, k=k)
        _known(dtype, GEMM_DTYPES)
        if product is not None:
            _known(product, GEMM_DTYPES)
        multiplied, peak_flops = self.chip.product(product or dtype)
        floor_s: float = max(gemm_bytes(dtype, multiplied, m, n, k) / self.chip.hbm_Bps, 2 * m * n * k / peak_flops)
        return max(floor_s, self.prices.gemm_s(dtype, product or dtype, m, n, k, captured=captured))

    def gemm_rows_s(self, *, m: NDArray[np.int64], n: int, k: int, dtype: str, product: str) -> NDArray[np.float64]:
        """`gemm_s(..., captured=True)` for many numbers of rows at once; only where constants are fitted."""
        if not isinstance(self.prices, FittedPrices):
            raise ValueError("many GEMMs at once are priced by fitted constants only")
        multiplied, peak_flops = self.chip.product(product)
        bytes_s = gemm_bytes(dtype, multiplied, m, n, k) / self.chip.hbm_Bps
        floor_s: NDArray[np.float64] = np.maximum(bytes_s, 2 * m * n * k / peak_flops)
        return np.maximum(floor_s, self.prices.gemm_rows_s(dtype, product, m, n, k))

    def prefill_attention_s(
        self,
        *,
        batch: int,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        cached_tokens: int = 0,
        kv_dtype: str = "bf16",
    ) -> float:
        """Time of one layer's causal attention of `batch` prompts of `tokens`, after `cached_tokens` each."""
        _heads(batch=batch, tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        _sizes(least=0, cached_tokens=cached_tokens)
        _known(kv_dtype, KV_DTYPES)
        shape = (kv_dtype, batch, tokens, cached_tokens, heads, kv_heads, head_dim)
        flops = attention_flops(batch, tokens, cached_tokens, heads, head_dim)
        floor_s = max(attention_bytes(*shape) / self.chip.hbm_Bps, flops / self.chip.half_flops)
        return max(floor_s, self.prices.prefill_s(*shape))

    def decode_attention_s(
        self, *, batch: int, context_tokens: int, heads: int, kv_heads: int, head_dim: int, kv_dtype: str = "bf16"
    ) -> float:
        """Time of one layer's attention of `batch` new tokens, each over a context of which it is the last."""
        _heads(batch=batch, context_tokens=context_tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        _known(kv_dtype, KV_DTYPES)
        shape = (kv_dtype, batch, 1, context_tokens - 1, heads, kv_heads, head_dim)
        floor_s = attention_bytes(*shape) / self.chip.hbm_Bps
        return max(floor_s, self.prices.decode_s(*shape))

    def all_reduce_s(self, *, nbytes: int, gpus: int) -> float:
        """Time until each of `gpus` GPUs of a host has the sum of `nbytes` of each; 0 for one GPU."""
        _sizes(nbytes=nbytes, gpus=gpus)
        if gpus == 1:
            return 0.0
        floor_s = nbytes / (self.chip.nvlink_Bps or self.chip.pcie_h2d_Bps)  # a switch may add on the way
        return max(floor_s, self.prices.all_reduce_s(nbytes, gpus))

    def moe_s(
        self,
        *,
        tokens: int,
        hidden: int,
        intermediate: int,
        experts: int,
        top_k: int,
        dtype: str,
        tp: int = 1,
        ep: int = 1,
        skew: float = 0.0,
        gated: bool = True,
    ) -> float:
        """Time of a layer's routed experts for `tokens` of the whole batch, on the busiest rank.

        Each expert has `intermediate` channels, cut over `tp` ranks; experts are dealt to `ep` groups of ranks. `skew`
        is the exponent of a power law that the experts' loads follow, 0 where all get the same; `gated` experts have
        three matrices, others two. Collectives are not included.
        """
        _sizes(tokens=tokens, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k, tp=tp, ep=ep)
        _known(dtype, GEMM_DTYPES)
        if top_k > experts:
            raise ValueError(f"top_k={top_k} exceeds experts={experts}; a token goes to each expert once at most")
        if ep > experts:
            raise ValueError(f"ep={ep} exceeds experts={experts}; each rank needs an expert")
        if not 0 <= skew <= 4:
            raise ValueError(f"skew={shown(skew)} must be between 0 (all experts alike) and 4")
        matrices = 3 if gated else 2
        batch = routed(tokens, experts, top_k, ep, skew)
        channels = intermediate / tp
        weight_bytes = batch.touched * matrices * hidden * channels * element_bytes(dtype)
        flops = 2 * matrices * hidden * channels * batch.rows
        floor_s = max(weight_bytes / self.chip.hbm_Bps, flops / self.chip.product(dtype)[1])
        price_s = self.prices.moe_s(dtype, tokens, hidden, channels, experts, top_k, matrices, batch)
        return max(floor_s, price_s)

    def elementwise_s(self, *, nbytes: int) -> float:
        """Time of a kernel such as a norm or an activation that reads and writes `nbytes` in all."""
        _sizes(nbytes=nbytes)
        return max(nbytes / self.chip.hbm_Bps, self.prices.elementwise_s(nbytes))

    def copy_s(self, *, nbytes: int, descriptors: int = 1, to_hbm: bool = True, duplex: bool = False) -> float:
        """Time of a batched copy of `descriptors` pieces, `nbytes` in all, between pinned host memory and HBM.

        `duplex`: the other direction is busy meanwhile.
        """
        _sizes(nbytes=nbytes, descriptors=descriptors)
        link_Bps = self.chip.pcie_h2d_Bps if to_hbm else self.chip.pcie_d2h_Bps
        return max(nbytes / link_Bps, self.prices.copy_s(nbytes, descriptors, to_hbm=to_hbm, duplex=duplex))

    def gather_s(self, *, rows: int, row_bytes: int, span_bytes: int) -> float:
        """Time in which a kernel reads `rows` of `row_bytes`, scattered over `span_bytes` of pinned host memory."""
        _sizes(rows=rows, row_bytes=row_bytes, span_bytes=span_bytes)
        return max(rows * row_bytes / self.chip.pcie_h2d_Bps, self.prices.gather_s(rows, row_bytes, span_bytes))

    def kmeans_s(self, *, heads: int, keys: int, clusters: int, head_dim: int, iterations: int) -> float:
        """Time of k-means over `keys` of each head: products of all keys with all centroids, the nearest, new means."""
        _sizes(heads=heads, keys=keys, clusters=clusters, head_dim=head_dim, iterations=iterations)
        nbytes = 2 * heads * (keys + clusters) * head_dim * 4
        return iterations * self.prices.nearest_s(heads * keys * clusters, head_dim, nbytes)

    def neighbours_s(self, *, heads: int, queries: int, keys: int, head_dim: int) -> float:
        """Time of exact nearest neighbours: products of all queries with all keys, and the largest of them."""
        _sizes(heads=heads, queries=queries, keys=keys, head_dim=head_dim)
        return self.prices.nearest_s(heads * queries * keys, head_dim, heads * (queries + keys) * head_dim * 4)


def _sizes(*, least: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not hasattr(size, "__index__") or size < least:
            raise ValueError(f"{name}={shown(size)} must be a whole number of {least} or more")


def _heads(*, heads: int, kv_heads: int, **sizes: int) -> None:
    _sizes(heads=heads, kv_heads=kv_heads, **sizes)
    if heads % kv_heads:
        raise ValueError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")


def _known(dtype: str, known: tuple[str, ...]) -> None:
    if dtype not in known:
        raise ValueError(f"unknown dtype {shown(dtype)}; known: {', '.join(known)}")
