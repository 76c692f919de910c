"""Copies by descriptor, gathers by row and span, and both directions of the link at once."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from kvsim.hardware.kernels.chip import Chip
from kvsim.hardware.kernels.shares import Seconds, Share, Stretch

_SPANS_BYTES = (1 << 30, 8 << 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFit:
    """Constants of the link between host memory and HBM; shares are of the datasheet's rate."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    copy_s: Seconds  # one copy, before its first byte
    descriptor_s: Seconds  # each piece of a batched copy
    one_way: Share
    both_ways: Share  # each direction while the other is busy
    gather_s: Seconds  # one gather, before its first row
    gather: Share  # rows of any size, read by a kernel
    near_rows_per_s: Stretch  # rows of a pool of up to 1 GiB
    far_rows_per_s: Stretch  # and of one of 8 GiB and more

    def copy_time_s(self, link_Bps: float, nbytes: int, descriptors: int, *, duplex: bool) -> float:
        """Time of one batched copy of `descriptors` pieces, `nbytes` in all."""
        share = self.both_ways if duplex else self.one_way
        return self.copy_s + max((descriptors - 1) * self.descriptor_s, nbytes / (share * link_Bps))

    def gather_time_s(self, chip: Chip, rows: int, row_bytes: int, span_bytes: int) -> float:
        """Time in which a kernel reads `rows` scattered over `span_bytes` of pinned host memory."""
        near, far = _SPANS_BYTES
        # The share of rows whose address is not at hand grows as 1 - near / span.
        missed = (1 - near / min(max(span_bytes, near), far)) / (1 - near / far)
        row_s = (1 - missed) / self.near_rows_per_s + missed / self.far_rows_per_s
        return self.gather_s + rows * max(row_s, row_bytes / (self.gather * chip.pcie_h2d_Bps))
