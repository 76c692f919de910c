"""A layer of routed experts: which experts a batch touches, how their rows fill tiles, and what that takes."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

from pydantic import ConfigDict

from kvsim.hardware.kernels.chip import Chip, element_bytes, smooth_max
from kvsim.hardware.kernels.shares import Seconds, Share, Sharpness, Stretch

_TILES = (16, 32, 64, 128)
_POPULAR_SHARE = 0.8  # of all tokens, the most that an expert is drawn to get under a power law


class Routed(NamedTuple):
    """Rows of the busiest rank: routed to it, experts that they touch, rows of the tiles that they fill."""

    rows: float
    touched: float
    padded_rows: float


@lru_cache(maxsize=65536)
def routed(tokens: int, experts: int, top_k: int, ep: int, skew: float) -> Routed:
    """Where `tokens` x `top_k` rows go on the busiest of `ep` ranks.

    With `skew` 0 all experts get the same. Else loads follow a power law with that exponent between 1 and 80 % of the
    tokens (as AIConfigurator draws them), and the busiest rank is above the mean by what random placement makes
    likely: sqrt(2 ln ep) standard deviations of a rank's sum.
    """
    local = max(1, experts // ep)
    if skew:
        loads = _skewed(tokens, experts, top_k, ep, local, skew)
    else:
        rows = max(tokens * top_k / ep, 1.0)
        touched = min(local, math.ceil(rows))
        loads = [rows / touched] * touched
    met = sum(min(1.0, load) for load in loads)
    mean = sum(loads) / max(met, 1.0)
    tile = next((tile for tile in _TILES if mean <= tile), _TILES[-1])
    padded = sum(math.ceil(max(load, 1.0) / tile) * tile * min(1.0, load) for load in loads)
    return Routed(sum(loads), met, padded)


def _skewed(tokens: int, experts: int, top_k: int, ep: int, local: int, skew: float) -> list[float]:
    most = max(2.0, _POPULAR_SHARE * tokens)

    def load(share: float) -> float:
        if skew == 1:
            return float(most**share)
        return float(((most ** (1 - skew) - 1) * share + 1) ** (1 / (1 - skew)))

    everywhere = [load((i + 0.5) / experts) for i in range(experts)]
    mean = sum(everywhere) / experts
    variation = math.sqrt(sum((one - mean) ** 2 for one in everywhere) / experts) / mean
    above = variation * math.sqrt(2 * math.log(ep) * (1 - 1 / ep) / local) if ep > 1 else 0.0
    rows = min(tokens * top_k / ep * min(1 + above, ep), tokens * min(top_k, local))
    loads = [load((i + 0.5) / local) for i in range(local)]
    scale = rows / sum(loads)
    loads = [one * scale for one in loads]
    for _ in range(5):  # no expert gets a token twice: what exceeds the tokens goes to the others
        excess = sum(one - tokens for one in loads if one > tokens)
        below = sum(one for one in loads if one < tokens)
        if excess <= 0 or below <= 0:
            break
        loads = [min(one, tokens) if one >= tokens else one * (1 + excess / below) for one in loads]
    return loads


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeFit:
    """Constants of the experts' two or three products in one type.

    time = start + experts + rows + ((bytes / (hbm BW))^p + depth^p + work^p)^(1/p): weights of touched experts stream
    while rows, in tiles, multiply; activations are written and read between the products.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start_s: Seconds
    hbm: Share  # of streaming weights, while tokens are no more than experts
    crowded_hbm: Share  # and beyond, where kernels take larger tiles
    sharpness: Sharpness
    peak: Share
    widening: Stretch  # exponent by which work grows beyond 2^20 weights in an expert's matrix
    depth_s: Seconds  # of each hidden and intermediate channel, in a row of products
    expert_s: Seconds  # of each touched expert
    row_s: Seconds  # of each row on the rank
    rank_rows: Stretch  # rate of activations of the rank's rows, as a share of HBM's
    all_rows: Stretch  # the same of all rows of the batch, which kernels walk over on every rank

    def parts_s(
        self, chip: Chip, dtype: str, tokens: int, hidden: int, intermediate: float, experts: int, top_k: int,
        matrices: int, rows: float, touched: float, padded_rows: float,
    ) -> tuple[float, float, float, float]:  # fmt: skip
        """Times of all that is added, and by bytes, depth and work; `intermediate` channels of this rank."""
        peak_flops = chip.product(dtype)[1]
        matrix = hidden * intermediate
        floor_s = 2 * matrices * matrix * padded_rows / peak_flops
        wide = (matrix / 2**20 + 1 + abs(matrix / 2**20 - 1)) / 2  # no less than 1
        channel_bytes = 2 * (3 * hidden + 2 * intermediate)
        added_s = (
            self.start_s
            + touched * self.expert_s
            + rows * (self.row_s + channel_bytes / (self.rank_rows * chip.hbm_Bps))
            + tokens * top_k * channel_bytes / (self.all_rows * chip.hbm_Bps)
        )
        hbm = self.hbm + (self.crowded_hbm - self.hbm) * (tokens > experts)
        memory_s = touched * matrices * matrix * element_bytes(dtype) / (hbm * chip.hbm_Bps)
        return added_s, memory_s, (hidden + intermediate) * self.depth_s, floor_s / self.peak * wide**self.widening

    def seconds(
        self, chip: Chip, dtype: str, tokens: int, hidden: int, intermediate: float, experts: int, top_k: int,
        matrices: int, batch: Routed,
    ) -> float:  # fmt: skip
        """Time of the busiest rank's experts for `tokens` of the whole batch."""
        added_s, *limits = self.parts_s(chip, dtype, tokens, hidden, intermediate, experts, top_k, matrices, *batch)
        return added_s + smooth_max(self.sharpness, *limits)
