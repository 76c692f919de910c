"""How quantised matrices lie in memory: their elements, and the scales and zero points that restore them."""

from dataclasses import dataclass
from typing import NamedTuple


class Stored(NamedTuple):
    """One part of a model's weights as it lies in memory.

    `dtype` is that of most of its elements, `product` the one that products with them run in: the same where
    activations are quantised too, else 16 bits. `nbytes` counts everything: scales, zero points, what is unconverted.
    `blockwise`: a scale stands for a block of rows and columns, which other kernels multiply than one for a tensor.
    """

    dtype: str
    product: str
    nbytes: int
    blockwise: bool = False

    def scaled(self, after: int, before: int) -> "Stored":
        """The bytes of `after` in `before` of the weights, rounded up."""
        return self._replace(nbytes=-(-self.nbytes * after // before)) if before else self


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """A format of quantised matrices.

    A scale of `scale_bits`, and a zero point of `zero_bits` packed into words of 32, stand for each block of `rows`
    outputs x `columns` inputs; 0 is all of them. `scales_per_scale` scales share one more of 32 bits. `input_bits` are
    kept for each input (an order of activations, or scales of them) and `fixed_bytes` for the matrix.
    `quantises_activations` says that products run in `dtype`.
    """

    dtype: str
    bits: int
    rows: int = 1
    columns: int = 0
    scale_bits: int = 16
    zero_bits: int = 0
    scales_per_scale: int = 0
    input_bits: int = 0
    fixed_bytes: int = 0
    quantises_activations: bool = False

    @property
    def blockwise(self) -> bool:
        """Whether a scale stands for several rows and columns, but not for all."""
        return self.rows > 1 and self.columns > 1

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a matrix with so many outputs and inputs."""
        rows = -(-outputs // (self.rows or outputs))
        columns = -(-inputs // (self.columns or inputs))
        bits = outputs * inputs * self.bits + rows * columns * self.scale_bits + inputs * self.input_bits
        if self.zero_bits:
            bits += columns * 32 * -(-rows * self.zero_bits // 32)
        if self.scales_per_scale:
            bits += 32 * -(-rows * columns // self.scales_per_scale)
        return -(-bits // 8) + self.fixed_bytes
