"""The shape of a decoder model: what its layers cache, weigh and compute."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from policies.dtypes import check_dtype, row_bytes
from policies.layer import LayerShape
from policies.shown import shown
from policies.weight_formats import Stored

__all__ = ["LayerShape", "ModelShape"]

MOST_PARAMS = 2**50
"""Of a model's weights: FLOPs and bytes fit 64 bits up to there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder model: its layers, its vocabulary and the types that it is stored in.

    `head_params` are the weights that the logits read, tied or not; `params` counts a tied matrix once. `dtype` is
    that of the activations and of linear layers' states, `kv_dtype` that of cached keys and values, `weight_dtype`
    that of all weights which nothing else is said of: `expert_dtype` is that of routed experts, `outer_dtype` that of
    what stands outside the layers (embeddings, the last norm, the head), and a quantised checkpoint's layers and head
    (`head_stored`) say how they are stored. `notes` are what whoever uses the shape should be told, `source` says how
    the weights were counted.

    `params` are the language model's. `other_params` are those of vision and audio towers beside it, which take memory
    too; `predictor_params` those of layers for multi-token prediction, which an engine loads only to speculate with.
    Whether the head is the embedding's matrix follows from the counts, unless `tied_head` says it.

    Raises ValueError for unknown dtypes, no layers, or a layer that shares the KV of one that stores none.
    """

    name: str
    hidden_dim: int
    vocab_size: int
    max_positions: int
    layers: tuple[LayerShape, ...]
    embedding_params: int
    head_params: int
    params: int
    dtype: str = "bf16"
    kv_dtype: str = "bf16"
    weight_dtype: str = "bf16"
    expert_dtype: str | None = None
    outer_dtype: str | None = None
    head_stored: Stored | None = None
    other_params: int = 0
    predictor_params: int = 0
    tied_head: bool | None = None
    source: str = field(default="", compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for dtype in (self.dtype, self.kv_dtype, self.weight_dtype, self.expert_dtype, self.outer_dtype):
            if dtype is not None:
                check_dtype(dtype)
        if not self.layers:
            raise ValueError(f"model {shown(self.name)} has no layers")
        if self.params > MOST_PARAMS:
            raise ValueError(
                f"model {shown(self.name)} has {self.params:,} weights; at most {MOST_PARAMS:,} are counted"
            )
        for index, layer in enumerate(self.layers):
            source = layer.share_kv_with
            if source is not None and not (0 <= source < index and self.layers[source].share_kv_with is None):
                raise ValueError(f"layer {index} shares the KV of layer {source}; name an earlier layer that stores KV")

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def active_params(self) -> int:
        """Weights that one token multiplies: the layers with their active experts, and the head; on average."""
        layers = ((x.qkv_params + x.out_params + x.mlp_active_params) // x.tokens_per_run for x in self.layers)
        return self.head_params + sum(layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as stored: the language model, and towers beside it in the type of the activations."""
        stored_bytes = plain = routed = 0
        for layer in self.layers:
            for params, stored in (
                (layer.qkv_params, layer.qkv_stored),
                (layer.out_params, layer.out_stored),
                (layer.dense_params, layer.dense_stored),
            ):
                stored_bytes += stored.nbytes if stored else 0
                plain += 0 if stored else params
            stored_bytes += layer.experts * layer.expert_stored.nbytes if layer.expert_stored else 0
            routed += 0 if layer.expert_stored else layer.routed_params
        outer = self.outer_params
        if self.head_stored and not self.tied:
            stored_bytes, outer = stored_bytes + self.head_stored.nbytes, outer - self.head_params
        if self.outer_dtype:
            stored_bytes, outer = stored_bytes + self.bytes_of(outer, self.outer_dtype), 0
        stored_bytes += self.bytes_of(self.other_params, self.dtype)
        return stored_bytes + self.bytes_of(plain + outer) + self.bytes_of(routed, self.expert_dtype)

    @property
    def outer_params(self) -> int:
        """Weights outside the layers: embeddings, the last norm and, where it is not tied, the head."""
        return self.params - sum(_layer_params(layer) for layer in self.layers)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding's matrix."""
        if self.tied_head is not None:
            return self.tied_head
        return self.outer_params < self.embedding_params + self.head_params

    @property
    def head_bytes(self) -> int:
        """Bytes of weights that computing logits reads."""
        if self.head_stored:
            return self.head_stored.nbytes
        return self.bytes_of(self.head_params, self.outer_dtype)

    def bytes_of(self, params: int, dtype: str | None = None) -> int:
        """Bytes of `params` weights stored in `dtype` (default: `weight_dtype`), in rows of `hidden_dim` elements."""
        rows, rest = divmod(params, self.hidden_dim)
        dtype = dtype or self.weight_dtype
        return rows * row_bytes((self.hidden_dim,), dtype) + row_bytes((rest,), dtype)

    def attention_bytes(self, layer: LayerShape) -> tuple[int, int]:
        """Bytes of a layer's weights before the policy's work, and of its output projection."""
        return (
            layer.qkv_stored.nbytes if layer.qkv_stored else self.bytes_of(layer.qkv_params),
            layer.out_stored.nbytes if layer.out_stored else self.bytes_of(layer.out_params),
        )

    def mlp_bytes_touched(self, layer: LayerShape, tokens: int) -> int:
        """Bytes of MLP weights that a batch of `tokens` reads in `layer`."""
        dense = layer.dense_stored.nbytes if layer.dense_stored else self.bytes_of(layer.dense_params)
        touched = layer.experts_touched(tokens)
        if layer.expert_stored:
            return dense + round(touched * layer.expert_stored.nbytes)
        return dense + self.bytes_of(round(touched * layer.expert_params), self.expert_dtype)

    def layer_bytes_touched(self, layer: LayerShape, tokens: int) -> int:
        """Bytes of all weights that a batch of `tokens` reads in `layer`."""
        if layer.qkv_stored or layer.out_stored:
            return sum(self.attention_bytes(layer)) + self.mlp_bytes_touched(layer, tokens)
        return self.bytes_of(layer.qkv_params + layer.out_params) + self.mlp_bytes_touched(layer, tokens)

    def products(self, layer: LayerShape) -> tuple[tuple[str, int], ...]:
        """Types that a layer's products run in, and the weights that a token multiplies in each.

        In order: before the policy's work, the output projection, the dense part of the MLP, routed experts.
        """
        routed = layer.experts_per_token * layer.expert_params
        parts = (
            (layer.qkv_stored, layer.qkv_params),
            (layer.out_stored, layer.out_params),
            (layer.dense_stored, layer.mlp_active_params - routed),
            (layer.expert_stored, routed),
        )
        return tuple((stored.product if stored else self.weight_dtype, params) for stored, params in parts)

    @property
    def head_product(self) -> str:
        """Type that the head's products run in."""
        return self.head_stored.product if self.head_stored else self.outer_dtype or self.weight_dtype

    @property
    def stored_dtypes(self) -> dict[str, str]:
        """The dtype of each part's weights; layers that differ are joined by `+`, the most common dtype first."""
        found: dict[str, Counter[str]] = {"attention": Counter(), "mlp": Counter(), "experts": Counter()}
        for layer in self.layers:
            for part, params, stored, plain in (
                ("attention", layer.qkv_params, layer.qkv_stored, self.weight_dtype),
                ("attention", layer.out_params, layer.out_stored, self.weight_dtype),
                ("mlp", layer.dense_params, layer.dense_stored, self.weight_dtype),
                ("experts", layer.routed_params, layer.expert_stored, self.expert_dtype or self.weight_dtype),
            ):
                if params:
                    found[part][stored.dtype if stored else plain] += params
        outer = self.outer_dtype or self.weight_dtype
        joined = {
            part: "+".join(dtype for dtype, _ in dtypes.most_common()) for part, dtypes in found.items() if dtypes
        }
        return {**joined, "embeddings": outer, "head": self.head_stored.dtype if self.head_stored else outer}

    def stored_as(self, weight_dtype: str | None = None, kv_dtype: str | None = None) -> ModelShape:
        """The same model with all its weights, or its cached keys and values, in another dtype; None leaves them."""
        model = self if kv_dtype is None else replace(self, kv_dtype=kv_dtype)
        if weight_dtype is None:
            return model
        layers = tuple(
            replace(layer, qkv_stored=None, out_stored=None, dense_stored=None, expert_stored=None)
            for layer in self.layers
        )
        return replace(
            model,
            layers=layers,
            weight_dtype=weight_dtype,
            expert_dtype=None,
            outer_dtype=None,
            head_stored=None,
            notes=(),
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one more token adds to an unbounded cache, on average over a block where rows stand for blocks."""
        return sum(layer.grown_bytes(self.kv_dtype) for layer in self.layers)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes that one sequence of `tokens` keeps: windows capped, linear states constant, shared layers nothing."""
        if tokens < 0:
            raise ValueError(f"tokens={tokens} must be 0 or more")
        return sum(layer.kv_bytes(tokens, self.kv_dtype, self.dtype) for layer in self.layers)

    def shard(self, tp: int) -> ModelShape:
        """One rank's part under tensor parallelism: heads, experts, MLP and vocabulary divided by `tp`.

        KV heads are replicated once `tp` exceeds them, an MLA latent and the down-projections to it always. Weights are
        divided with rounding up.

        Raises ValueError when `tp` does not divide the heads.
        """
        if tp < 1:
            raise ValueError(f"tp={tp} must be at least 1")
        layers = tuple(layer.shard(tp) for layer in self.layers)
        return replace(
            self,
            layers=layers,
            embedding_params=-(-self.embedding_params // tp),
            head_params=-(-self.head_params // tp),
            params=-(-self.outer_params // tp) + sum(_layer_params(layer) for layer in layers),
            head_stored=self.head_stored and self.head_stored.scaled(1, tp),
            other_params=-(-self.other_params // tp),
            predictor_params=-(-self.predictor_params // tp),
        )

    def with_kv_heads(self, kv_heads: int) -> ModelShape:
        """A head group: each layer with `kv_heads` KV heads and their query heads; MLP and vocabulary stay whole.

        Raises ValueError when a layer has fewer KV heads than that. Linear layers, which cache no heads, stay as is.
        """
        least = min((layer.kv_heads for layer in self.layers if layer.kind != "linear"), default=0)
        if not 1 <= kv_heads <= least:
            raise ValueError(f"kv_heads={kv_heads} is not within 1 and the {least} KV heads of {shown(self.name)}")
        layers = tuple(
            layer if layer.kind == "linear" else layer.with_heads(kv_heads * layer.group, kv_heads)
            for layer in self.layers
        )
        saved = sum(_layer_params(layer) for layer in self.layers) - sum(_layer_params(layer) for layer in layers)
        return replace(self, layers=layers, params=self.params - saved)


def _layer_params(layer: LayerShape) -> int:
    return layer.qkv_params + layer.out_params + layer.mlp_params
