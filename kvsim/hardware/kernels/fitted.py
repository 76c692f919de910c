"""Prices by constants that were fitted to measured kernels: those of `serving` and `measured`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.kernels.chip import Chip
from kvsim.hardware.kernels.experts import Routed
from kvsim.hardware.kernels.kernel_file import KernelFits, fit_for
from kvsim.hardware.kernels.rated import RatedPrices


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedPrices:
    """Every kernel by its own closed form; all-reduce without NVLink by the set's rates."""

    chip: Chip
    fits: KernelFits
    rated: RatedPrices

    def gemm_s(self, dtype: str, product: str, m: int, n: int, k: int, *, captured: bool) -> float:
        """One GEMM with weights of `dtype`, whose products run in `product` where the GPU has units for that."""
        fit = fit_for(self.fits.gemm, product, self.chip.product(product)[0])
        return fit.seconds(self.chip, dtype, m, n, k, product=product, captured=captured)

    def gemm_rows_s(self, dtype: str, product: str, m: NDArray[np.int64], n: int, k: int) -> NDArray[np.float64]:
        """The same in CUDA graphs, for many numbers of rows at once."""
        fit = fit_for(self.fits.gemm, product, self.chip.product(product)[0])
        return fit.captured_s(self.chip, dtype, m, n, k, product)

    def prefill_s(
        self, kv_dtype: str, batch: int, tokens: int, cached: int, heads: int, kv_heads: int, head_dim: int
    ) -> float:
        """One layer's attention of whole prompts."""
        fit = fit_for(self.fits.prefill_attention, kv_dtype, kv_dtype)
        return fit.seconds(self.chip, kv_dtype, batch, tokens, cached, heads, kv_heads, head_dim)

    def decode_s(
        self, kv_dtype: str, batch: int, tokens: int, cached: int, heads: int, kv_heads: int, head_dim: int
    ) -> float:
        """One layer's attention of one new token a sequence."""
        fit = fit_for(self.fits.decode_attention, kv_dtype, kv_dtype)
        return fit.seconds(self.chip, kv_dtype, batch, tokens + cached, heads, kv_heads, head_dim)

    def all_reduce_s(self, nbytes: int, gpus: int) -> float:
        """By the engine's own kernels, or by NCCL."""
        if self.fits.all_reduce is None or not self.chip.nvlink_Bps:
            return self.rated.all_reduce_s(nbytes, gpus)
        return self.fits.all_reduce.seconds(self.chip, nbytes, gpus)

    def moe_s(
        self, dtype: str, tokens: int, hidden: int, intermediate: float, experts: int, top_k: int, matrices: int,
        batch: Routed,
    ) -> float:  # fmt: skip
        """The busiest rank's experts."""
        fit = fit_for(self.fits.moe, dtype, self.chip.product(dtype)[0])
        return fit.seconds(self.chip, dtype, tokens, hidden, intermediate, experts, top_k, matrices, batch)

    def elementwise_s(self, nbytes: int) -> float:
        """Bytes read and written by one kernel."""
        fit = self.fits.elementwise
        return fit.start_s + nbytes / (fit.hbm * self.chip.hbm_Bps)

    def copy_s(self, nbytes: int, descriptors: int, *, to_hbm: bool, duplex: bool) -> float:
        """A batched copy."""
        link_Bps = self.chip.pcie_h2d_Bps if to_hbm else self.chip.pcie_d2h_Bps
        return self.fits.transfers.copy_time_s(link_Bps, nbytes, descriptors, duplex=duplex)

    def gather_s(self, rows: int, row_bytes: int, span_bytes: int) -> float:
        """Scattered rows, read by a kernel."""
        return self.fits.transfers.gather_time_s(self.chip, rows, row_bytes, span_bytes)

    def nearest_s(self, products: int, dims: int, nbytes: int) -> float:
        """Products in TF32 and their maxima."""
        return self.fits.clusters.seconds(self.chip, products, dims, nbytes)
