"""A model's own layers as a serving engine's kernels run them: each matrix, elementwise kernel and layer of experts.

Prices are `kvsim.hardware.kernels`, as if launched by CUDA graphs: decode steps are captured, and the launches of
longer prefills run ahead of the GPU. They are made for many batch sizes at once, since the loop meets one after the
other. What a layer's shape does not tell is taken as usual: a gated MLP, whose first two matrices are one, a norm
with a residual before both halves, a rotary embedding.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.kernels.chip import element_bytes
from kvsim.hardware.kernels.prices import Kernels
from policies.model import LayerShape, ModelShape
from policies.weight_formats import Stored

Rows = NDArray[np.int64]
Seconds = NDArray[np.float64]

_ACTIVATION_BYTES = 2
_NORM_PASSES = 4  # reads of the residual and of what is added to it; writes of their sum and of its norm
_ROUND = 16  # of a matrix: what exceeds it of the weights counted as one are norms and biases


class Part(NamedTuple):
    """Seconds of some kernels on the SMs for each of some batch sizes, and what of them is due to what.

    `hbm_s` and `work_s` are those in which HBM and arithmetic units are busy, at the same time for the most. A kernel's
    own time, after it has begun, is due to the longer of the two: `by_hbm_s` or `by_compute_s`.
    """

    seconds: Seconds
    hbm_s: Seconds
    work_s: Seconds
    by_hbm_s: Seconds
    by_compute_s: Seconds

    def plus(self, other: "Part") -> "Part":
        """This, then the other."""
        return Part(*(mine + its for mine, its in zip(self, other, strict=True)))

    def times(self, share: Seconds) -> "Part":
        """This in a share of all cases."""
        return Part(*(share * mine for mine in self))


class Matrix(NamedTuple):
    """A matrix of a layer: `n` outputs, `k` inputs, the format of its weights, and the type of products with them."""

    n: int
    k: int
    dtype: str
    product: str


class Sustained(NamedTuple):
    """What large GEMMs reach, and how soon the smallest one ends."""

    start_s: float
    byte_s: float  # of weights
    flop_s: float


class ServedModel:
    """What the layers and the head of models take on one of `tp` GPUs, by its kernels."""

    def __init__(self, kernels: Kernels, tp: int) -> None:
        self.kernels, self._tp = kernels, tp
        self._sustained: dict[tuple[str, str], Sustained] = {}

    def layer(self, model: ModelShape, layer: LayerShape, tokens: Rows) -> tuple[Part, Part, Part]:
        """A layer's parts for batches of `tokens`: before the policy, output projection, MLP.

        A block layer's are means over where in its block each sequence is.
        """
        share: Seconds = 1 - (1 - 1 / layer.tokens_per_run) ** tokens.astype(np.float64)
        rows = np.maximum(1, np.rint(tokens / (layer.tokens_per_run * share))).astype(np.int64)
        before = self._norm(model, rows).plus(self._rotary(layer, rows))
        for matrix in before_matrices(model, layer):
            before = before.plus(self.gemm(matrix, rows))
        out = nothing(rows)
        for matrix in out_matrices(model, layer):
            out = out.plus(self.gemm(matrix, rows))
        mlp = self._mlp(model, layer, rows) if layer.mlp_params else nothing(rows)
        qkv_bytes, out_bytes = model.attention_bytes(layer)
        mlp_bytes = np.array([model.mlp_bytes_touched(layer, n) for n in (rows.tolist() if layer.experts else [1])])
        parts = (before, qkv_bytes), (out, out_bytes), (mlp, mlp_bytes)
        first, second, third = (self._no_sooner(part, nbytes).times(share) for part, nbytes in parts)
        return first, second, third

    def head(self, model: ModelShape, logits: Rows) -> Part:
        """The last norm, the output head and the choice of a token, for `logits` positions."""
        outputs = max(1, model.head_params // model.hidden_dim)
        stored = _stored(model.head_stored, model.outer_dtype or model.weight_dtype)
        part = self._norm(model, logits).plus(self.gemm(Matrix(outputs, model.hidden_dim, *stored), logits))
        part = part.plus(self.elementwise(logits * outputs * _ACTIVATION_BYTES))
        return self._no_sooner(part, model.head_bytes)

    def gemm(self, matrix: Matrix, rows: Rows) -> Part:
        """One matrix times so many rows."""
        n, k, dtype, product = matrix
        seconds = self.kernels.gemm_rows_s(m=rows, n=n, k=k, dtype=dtype, product=product)
        flops: Seconds = (2 * n * k) * rows.astype(np.float64)
        return self._bound(seconds, self.sustained(dtype, product), element_bytes(dtype) * n * k, flops)

    def elementwise(self, nbytes: Rows) -> Part:
        """A kernel that reads and writes so many bytes in all."""
        moving_s: Seconds = nbytes.astype(np.float64) * self.elementwise_byte_s
        nothing_s = np.zeros(len(nbytes))
        return Part(self.elementwise_start_s + moving_s, moving_s, nothing_s, moving_s, nothing_s)

    @cached_property
    def elementwise_start_s(self) -> float:
        """What an elementwise kernel takes before it moves anything."""
        return self.kernels.elementwise_s(nbytes=1)

    @cached_property
    def elementwise_byte_s(self) -> float:
        """What it takes for each byte."""
        return (self.kernels.elementwise_s(nbytes=1 << 30) - self.elementwise_start_s) / (1 << 30)

    def sustained(self, dtype: str, product: str) -> Sustained:
        """What GEMMs with weights of `dtype` reach."""
        key = dtype, product
        if key not in self._sustained:
            price = partial(self.kernels.gemm_s, dtype=dtype, product=product, captured=True)
            start_s, much_s = price(m=1, n=16, k=16), price(m=8192, n=8192, k=8192)
            one_s, two_s = price(m=1, n=32768, k=8192), price(m=1, n=65536, k=8192)
            byte_s = (two_s - one_s) / (element_bytes(dtype) * 32768 * 8192)
            self._sustained[key] = Sustained(start_s, byte_s, (much_s - start_s) / (2 * 8192**3))
        return self._sustained[key]

    def _mlp(self, model: ModelShape, layer: LayerShape, rows: Rows) -> Part:
        part = self._norm(model, rows)
        for up, down in dense_matrices(model, layer, self._tp):
            part = part.plus(self.gemm(up, rows)).plus(self.gemm(down, rows))
            part = part.plus(self.elementwise(3 * down.k * rows * _ACTIVATION_BYTES))
        if layer.expert_params and layer.experts_per_token:
            router = Matrix(layer.experts, model.hidden_dim, *_stored(None, model.dtype))
            part = part.plus(self.gemm(router, rows)).plus(self._experts(model, layer, rows))
        return part

    def _experts(self, model: ModelShape, layer: LayerShape, rows: Rows) -> Part:
        dtype, product = _stored(layer.expert_stored, model.expert_dtype or model.weight_dtype)
        channels = max(1, layer.expert_params // (3 * model.hidden_dim))
        experts, top_k = layer.experts, layer.experts_per_token
        price = partial(self.kernels.moe_s, hidden=model.hidden_dim, intermediate=channels, experts=experts)
        seconds = np.array([price(tokens=n, top_k=top_k, dtype=dtype) for n in rows.tolist()])
        routed: Seconds = rows.astype(np.float64) * top_k * layer.expert_params
        touched = experts * (1 - (1 - top_k / experts) ** rows.astype(np.float64))
        nbytes = element_bytes(dtype) * touched * layer.expert_params
        return self._bound(seconds, self.sustained(dtype, product), nbytes, 2 * routed)

    def _norm(self, model: ModelShape, rows: Rows) -> Part:
        return self.elementwise(_NORM_PASSES * rows * model.hidden_dim * _ACTIVATION_BYTES)

    def _rotary(self, layer: LayerShape, rows: Rows) -> Part:
        return self.elementwise(2 * rows * (layer.heads + layer.kv_heads) * layer.head_dim * _ACTIVATION_BYTES)

    def _no_sooner(self, part: Part, weight_bytes: int | Rows) -> Part:
        """Never sooner than all weights can be read, of which some may be stored in another way than most."""
        late_s = np.maximum(0.0, weight_bytes / self.kernels.chip.hbm_Bps - part.seconds)
        nothing_s = np.zeros(len(late_s))
        return part.plus(Part(late_s, late_s, nothing_s, late_s, nothing_s))

    def _bound(self, seconds: Seconds, most: Sustained, nbytes: float | Seconds, flops: Seconds) -> Part:
        """A product's time, and what it is due to."""
        hbm_s, work_s = np.minimum(seconds, nbytes * most.byte_s), np.minimum(seconds, flops * most.flop_s)
        rest_s = np.maximum(0.0, seconds - most.start_s)
        by_compute_s = np.where(work_s > hbm_s, rest_s, 0.0)
        return Part(seconds, hbm_s, work_s, rest_s - by_compute_s, by_compute_s)


def nothing(rows: Rows) -> Part:
    """No kernel at all."""
    return Part(*(np.zeros(len(rows)) for _ in Part._fields))


def before_matrices(model: ModelShape, layer: LayerShape) -> Iterator[Matrix]:
    """What a layer multiplies before its attention: one matrix, or MLA's projections to latents and from them."""
    stored = _stored(layer.qkv_stored, model.weight_dtype)
    hidden = model.hidden_dim
    yield from _matrix(layer.whole_params or layer.qkv_params, hidden, stored)
    if layer.whole_params:
        query_latent = layer.whole_params // hidden - layer.latent_dim
        inputs = query_latent if query_latent > 0 else hidden
        yield from _matrix(layer.qkv_params - layer.whole_params, inputs, stored)


def out_matrices(model: ModelShape, layer: LayerShape) -> Iterator[Matrix]:
    """The output projection."""
    for matrix in _matrix(layer.out_params, model.hidden_dim, _stored(layer.out_stored, model.weight_dtype)):
        yield matrix._replace(n=matrix.k, k=matrix.n)


def dense_matrices(model: ModelShape, layer: LayerShape, tp: int) -> Iterator[tuple[Matrix, Matrix]]:
    """The first and the last matrix of the MLP that all tokens use, if there is one; the first is two, side by side."""
    hidden = model.hidden_dim
    channels = max(0, layer.dense_params - layer.experts * hidden // tp) // (3 * hidden)  # and without the router
    if channels:
        stored = _stored(layer.dense_stored, model.weight_dtype)
        yield Matrix(2 * channels, hidden, *stored), Matrix(hidden, channels, *stored)


def _matrix(params: int, k: int, stored: tuple[str, str]) -> Iterator[Matrix]:
    n = params // k
    if n:
        yield Matrix(n // _ROUND * _ROUND or n, k, *stored)


def _stored(stored: Stored | None, dtype: str) -> tuple[str, str]:
    """The format that kernels are priced in, and the type that they multiply in where the GPU can."""
    if stored is None:
        return dtype, dtype
    if stored.product == stored.dtype:
        name = "fp8_block" if stored.blockwise and stored.dtype == "fp8" else stored.dtype
        return name, name
    return stored.dtype, stored.product
