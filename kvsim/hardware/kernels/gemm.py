"""GEMMs: tiles in waves over the SMs while weights stream, and what quantising and launching add."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from kvsim.hardware.kernels.chip import Chip, element_bytes, smooth_max, smooth_max_of
from kvsim.hardware.kernels.shares import Count, Seconds, Share, Sharpness, Stretch

Rows = Any
"""A number of rows, or a column of such: what is computed with it is of the same kind."""
_ANY = 1 << 62  # rows, where a tile has no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A part of the output that one SM computes at a time, for GEMMs of at most `most_rows` rows."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    rows: Count
    columns: Count
    most_rows: Count | None = None
    peak: Share  # of the SM's share of the peak, while it multiplies
    start_s: Seconds  # of each wave: its first loads and its last stores


class Tiles(NamedTuple):
    """Several tiles, as columns."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    peak: NDArray[np.float64]
    start_s: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLaunch:
    """Time in which the host launches the kernels of a GEMM of at most `most_rows` rows."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    most_rows: Count | None = None
    launch_s: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmFit:
    """Constants of one GPU's GEMMs in one type.

    time = start + quantising + ((bytes / (hbm BW))^p + work^p)^(1/p), where work is the quickest tile's waves, and no
    less than FLOPs / (peak P) + output / (output BW). Kernels launched one by one by the host take no less than that.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start_s: Seconds
    hbm: Share
    sharpness: Sharpness
    peak: Share  # sustained by large GEMMs
    output: Stretch  # rate of stores that nothing hides, as a share of HBM's; above 1 most are hidden
    tiles: tuple[Tile, ...]
    most_splits: Count = 1  # parts of k that are computed at once where tiles are few
    split_s: Seconds = 0.0
    row_s: Seconds = 0.0  # quantising a row of activations
    quantising: Stretch | None = None  # rate of reading, writing and reading again what is quantised
    host: tuple[HostLaunch, ...] = ()
    ragged_s: Seconds = 0.0  # added to the host's where rows are no multiple of four

    def __post_init__(self) -> None:
        if all(tile.most_rows is not None for tile in self.tiles):
            raise ValueError("tiles must have one without most_rows, which takes GEMMs of any size")

    def fitting(self, m: int) -> list[Tile]:
        """The tiles that a kernel for `m` rows chooses from: those of the smallest limit that holds them."""
        limits = [tile.most_rows for tile in self.tiles if tile.most_rows is not None and tile.most_rows >= m]
        limit = min(limits, default=None)
        return [tile for tile in self.tiles if tile.most_rows == limit]

    @property
    def splits(self) -> list[int]:
        """Numbers of parts that k may be cut into: powers of two."""
        return [1 << power for power in range(self.most_splits.bit_length())]

    def waves_s(
        self, chip: Chip, peak_flops: float, tile: "Tile | Tiles", splits: Rows, m: Rows, n: int, k: int
    ) -> Any:
        """Time of all waves of one tile, with k in `splits` parts that are summed in fp32."""
        waves = -(-(-(-m // tile.rows) * -(-n // tile.columns) * splits) // chip.sms)
        wave_s = 2 * tile.rows * tile.columns * k / splits * chip.sms / (tile.peak * peak_flops) + tile.start_s
        summed_s = (splits > 1) * (self.split_s + 8 * splits * m * n / chip.hbm_Bps)
        return waves * wave_s + summed_s

    def plateau_s(self, chip: Chip, peak_flops: float, m: Rows, n: int, k: int) -> Any:
        """Time of all FLOPs at the sustained rate, and of the stores that nothing hides."""
        return 2 * m * n * k / (self.peak * peak_flops) + 2 * m * n / (self.output * chip.hbm_Bps)

    def quantising_s(self, chip: Chip, m: Rows, k: int) -> Any:
        """Time of quantising (m, k) activations in a kernel of its own."""
        if self.quantising is None:
            return m * self.row_s
        return m * self.row_s + 3 * m * k / (self.quantising * chip.hbm_Bps)

    def host_s(self, m: int) -> float:
        """Time in which the host launches the kernels; 0 where a CUDA graph does."""
        for launch in self.host:
            if launch.most_rows is None or m <= launch.most_rows:
                return launch.launch_s + (self.ragged_s if m % 4 else 0.0)
        return 0.0

    def seconds(
        self, chip: Chip, dtype: str, m: int, n: int, k: int, *, product: str = "", captured: bool = False
    ) -> float:
        """Time of (m, k) activations times (k, n) weights of `dtype`; `captured`: launched by a CUDA graph.

        Products run in `product`, by default the weights' own type, where the GPU has units for that.
        """
        product, peak_flops = chip.product(product or dtype)
        work_s = self.plateau_s(chip, peak_flops, m, n, k)
        if not widened(dtype, product):  # Marlin's kernels cut any shape into equal parts
            tiles = [(tile, splits) for tile in self.fitting(m) for splits in self.splits]
            work_s = max(work_s, min(self.waves_s(chip, peak_flops, *one, m, n, k) for one in tiles))
        memory_s = gemm_bytes(dtype, product, m, n, k) / (self.hbm * chip.hbm_Bps)
        device_s = self.start_s + self.quantising_s(chip, m, k) + smooth_max(self.sharpness, memory_s, work_s)
        return device_s if captured else smooth_max(8, device_s, self.host_s(m))

    def captured_s(
        self, chip: Chip, dtype: str, rows: NDArray[np.int64], n: int, k: int, product: str
    ) -> NDArray[np.float64]:
        """The same for many numbers of rows at once, in CUDA graphs."""
        product, peak_flops = chip.product(product)
        work_s = self.plateau_s(chip, peak_flops, rows, n, k)
        if not widened(dtype, product):
            limits = sorted({tile.most_rows or _ANY for tile in self.tiles})
            for below, limit in zip([0, *limits], limits, strict=False):
                chosen = (rows > below) & (rows <= limit)
                if chosen.any():
                    work_s[chosen] = np.maximum(work_s[chosen], self._least_s(chip, peak_flops, rows[chosen], n, k))
        memory_s = gemm_bytes(dtype, product, rows, n, k) / (self.hbm * chip.hbm_Bps)
        before_s: NDArray[np.float64] = self.start_s + self.quantising_s(chip, rows, k) + np.zeros(len(rows))
        return before_s + smooth_max_of(self.sharpness, memory_s, work_s)

    def _least_s(self, chip: Chip, peak_flops: float, rows: NDArray[np.int64], n: int, k: int) -> NDArray[np.float64]:
        """Waves of the quickest tile, for numbers of rows that choose from the same ones."""
        fitting, splits = self.fitting(int(rows[0])), np.array(self.splits)[:, None, None]
        names = ("rows", "columns", "peak", "start_s")
        tiles = Tiles(*(np.array([getattr(tile, name) for tile in fitting])[:, None] for name in names))
        waves_s = self.waves_s(chip, peak_flops, tiles, splits, rows, n, k)  # (splits, tiles, rows)
        least_s: NDArray[np.float64] = waves_s.min(axis=(0, 1))
        return least_s


def widened(dtype: str, product: str) -> bool:
    """Whether weights of `dtype` are widened as they stream, to multiply in `product`."""
    return product in ("bf16", "fp16", "fp32") and element_bytes(dtype) < 2


def gemm_bytes(dtype: str, product: str, m: Rows, n: int, k: int) -> Any:
    """Bytes of the weights, of activations in the type that they are multiplied in, and of a 16-bit output."""
    input_bytes = 2.0 if widened(dtype, product) else element_bytes(dtype)
    return element_bytes(dtype) * n * k + input_bytes * m * k + 2 * m * n
