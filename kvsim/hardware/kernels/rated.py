"""Prices by a parameter set's rates alone: those of `datasheet`, `eager` and files without kernels' constants."""

from dataclasses import dataclass

from kvsim.hardware.kernels.attention import attention_bytes, attention_flops
from kvsim.hardware.kernels.chip import Chip, element_bytes
from kvsim.hardware.kernels.experts import Routed
from kvsim.hardware.kernels.gemm import gemm_bytes
from kvsim.hardware.rates import Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedPrices:
    """Bytes and products at a set's rates: at once (`datasheet`), or one after the other, as in code without graphs."""

    chip: Chip
    rates: Rates
    overlapped: bool

    def _products_s(self, product: str, nbytes: float, flops: float, launches: int) -> float:
        memory_s, work_s = nbytes / self.rates.hbm_Bps, flops / self.rates.flops(self.chip.product(product)[0])
        return launches * self.rates.launch_s + (max(memory_s, work_s) if self.overlapped else memory_s + work_s)

    def gemm_s(self, dtype: str, product: str, m: int, n: int, k: int, *, captured: bool) -> float:
        """One GEMM with weights of `dtype`, whose products run in `product` where the GPU has units for that."""
        return self._products_s(product, gemm_bytes(dtype, self.chip.product(product)[0], m, n, k), 2 * m * n * k, 1)

    def attention_s(
        self, kv_dtype: str, batch: int, tokens: int, cached: int, heads: int, kv_heads: int, head_dim: int
    ) -> float:
        """One layer's attention: the larger of bytes and FLOPs."""
        nbytes = attention_bytes(kv_dtype, batch, tokens, cached, heads, kv_heads, head_dim)
        flops = attention_flops(batch, tokens, cached, heads, head_dim)
        return self.rates.launch_s + max(nbytes / self.rates.hbm_Bps, flops / self.rates.attention_flops)

    prefill_s = attention_s
    decode_s = attention_s

    def all_reduce_s(self, nbytes: int, gpus: int) -> float:
        """A ring's two steps, over PCIe where there is no NVLink."""
        rates = self.rates
        latency_s, peer_Bps = rates.nvlink_latency_s, rates.nvlink_Bps
        if not peer_Bps:
            latency_s, peer_Bps = rates.pcie_latency_s, rates.pcie_h2d_Bps
        return 2 * latency_s + 2 * (gpus - 1) / gpus * nbytes / peer_Bps

    def moe_s(
        self, dtype: str, tokens: int, hidden: int, intermediate: float, experts: int, top_k: int, matrices: int,
        batch: Routed,
    ) -> float:  # fmt: skip
        """The busiest rank's experts, two launches."""
        matrix = matrices * hidden * intermediate
        return self._products_s(dtype, batch.touched * matrix * element_bytes(dtype), 2 * matrix * batch.rows, 2)

    def elementwise_s(self, nbytes: int) -> float:
        """Bytes read and written by one kernel."""
        return self.rates.launch_s + nbytes / self.rates.elementwise_Bps

    def copy_s(self, nbytes: int, descriptors: int, *, to_hbm: bool, duplex: bool) -> float:
        """A batched copy; a descriptor costs what a copy does."""
        link_Bps = self.rates.pcie_h2d_Bps if to_hbm else self.rates.pcie_d2h_Bps
        return descriptors * self.rates.pcie_latency_s + nbytes / link_Bps

    def gather_s(self, rows: int, row_bytes: int, span_bytes: int) -> float:
        """Scattered rows, read by a kernel at the rate of their size."""
        link_Bps = min(self.rates.pcie_h2d_Bps, self.rates.gather_Bps(row_bytes))
        return self.rates.launch_s + rows * row_bytes / link_Bps

    def nearest_s(self, products: int, dims: int, nbytes: int) -> float:
        """Products in fp32 and their maxima."""
        return self._products_s("fp32", nbytes, 2 * products * dims, 1)
