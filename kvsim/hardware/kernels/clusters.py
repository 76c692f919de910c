"""k-means and exact neighbours: products of keys with centroids or keys, and their maxima."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from kvsim.hardware.kernels.chip import Chip
from kvsim.hardware.kernels.shares import Seconds, Share


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFit:
    """Constants of products in fp32 range whose rows are reduced to their largest entries at once."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start_s: Seconds
    peak: Share  # TF32 with the argmax, as a share of the 16-bit peak; TF32 alone has half of that
    hbm: Share

    def seconds(self, chip: Chip, products: int, dims: int, nbytes: int) -> float:
        """Time of `products` dot products of `dims` each, with `nbytes` read or written."""
        return self.start_s + max(
            2 * products * dims / (self.peak * chip.half_flops), nbytes / (self.hbm * chip.hbm_Bps)
        )
