"""The shape of a decoder model: what its layers cache, weigh and compute."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from policies.dtypes import check_dtype, row_bytes
from policies.shown import shown
from policies.weight_formats import Stored

MOST_HEAD_DIMS = 2**20
MOST_PARAMS = 2**50
"""Of a layer's heads times their dimensions, and of a model's weights: FLOPs and bytes fit 64 bits up to there."""

LAYER_KINDS = ("full", "sliding", "mla", "linear", "block", "core", "compressed")


_OWN_FIELDS = {
    "window_tokens": ("sliding", "core", "compressed"),
    "block_tokens": ("block", "core", "compressed"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One decoder layer: its attention, what that caches, and the weights of each part.

    `kind` is `full`, `sliding` (a window, or local chunks), `mla` (one latent vector per token, which all heads share:
    `kv_heads` is 1), `linear` (a state of constant size: Mamba, gated delta net; `heads` are those of the state),
    `block` (a dense layer over blocks of `block_tokens`, run once a block: Block Transformer, arXiv:2406.02657) or
    `core` (the last `window_tokens`, and one row for each `block_tokens` before them: CCA, arXiv:2412.12465), or
    `compressed` (the last `window_tokens`, and one row for each `block_tokens` of all, a row being one vector of
    `latent_dim` that is key and value: DeepSeek-V4).
    Full and sliding layers with `state_elements` have a linear mixer beside their attention (Falcon-H1). Layers with an
    `index_dim` cache a key of that many elements for each row besides, with which `index_heads` choose the `index_topk`
    rows that are attended to (DeepSeek-V3.2).
    Norm weights count with `qkv_params` and `mlp_params`. `whole_params` are those of `qkv_params` that every
    tensor-parallel rank has whole: MLA's down-projections. `mlp_params` holds every routed expert, `mlp_active_params`
    the ones that a single token uses. Of a quantised checkpoint, `qkv_stored`, `out_stored`, `dense_stored` (all of the
    MLP but routed experts) and `expert_stored` (one of these) say how each part lies in memory.

    Raises ValueError when the numbers contradict each other.
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    window_tokens: int = 0
    latent_dim: int = 0
    state_elements: int = 0
    block_tokens: int = 0
    index_dim: int = 0
    index_heads: int = 0
    index_topk: int = 0
    share_kv_with: int | None = None
    qkv_params: int
    whole_params: int = 0
    out_params: int
    mlp_params: int
    mlp_active_params: int
    experts: int = 0
    experts_per_token: int = 0
    expert_params: int = 0
    qkv_stored: Stored | None = None
    out_stored: Stored | None = None
    dense_stored: Stored | None = None
    expert_stored: Stored | None = None

    def __post_init__(self) -> None:
        if self.kind not in LAYER_KINDS:
            raise ValueError(f"unknown layer kind {shown(self.kind)}; known: {', '.join(LAYER_KINDS)}")
        for name in ("heads", "kv_heads", "head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.heads * max(self.head_dim, self.v_head_dim) > MOST_HEAD_DIMS:
            dims = f"head_dim={self.head_dim} and v_head_dim={self.v_head_dim}"
            raise ValueError(f"heads={self.heads} with {dims} exceed {MOST_HEAD_DIMS:,} dimensions of a layer")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        for name, kinds in _OWN_FIELDS.items():
            if (getattr(self, name) > 0) != (self.kind in kinds):
                alone = " and ".join((", ".join(kinds[:-1]), kinds[-1])) if kinds[1:] else kinds[0]
                raise ValueError(f"{name}={getattr(self, name)} in a {self.kind} layer; {alone} layers alone have it")
        if (self.latent_dim > 0) != (self.kind in ("mla", "compressed")) and (
            self.kind != "sliding" or self.latent_dim < 0
        ):
            raise ValueError(
                f"latent_dim={self.latent_dim} in a {self.kind} layer; mla and compressed layers have it, sliding may"
            )
        if self.state_elements < (1 if self.kind == "linear" else 0):
            raise ValueError(f"state_elements={self.state_elements} in a {self.kind} layer must be at least 1")
        if self.state_elements and self.kind not in ("linear", "full", "sliding"):
            raise ValueError(f"state_elements={self.state_elements} in a {self.kind} layer; it caches no state")
        if (self.index_dim > 0) != (self.index_heads > 0):
            raise ValueError(f"index_dim={self.index_dim} and index_heads={self.index_heads}: give both or neither")
        if not 0 <= self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} is not within 0 and experts={self.experts}")

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def tokens_per_run(self) -> int:
        """Tokens of a sequence for which the layer runs once."""
        return self.block_tokens if self.kind == "block" else 1

    def share_run(self, tokens: int) -> float:
        """The chance that any of `tokens`, each of another sequence, makes the layer run: it ends a block."""
        return 1 - (1 - 1 / self.tokens_per_run) ** tokens

    @property
    def dense_params(self) -> int:
        """Weights of the MLP that every token uses: all but routed experts, the router included."""
        return self.mlp_params - self.routed_params

    @property
    def routed_params(self) -> int:
        """Weights of all routed experts of the layer."""
        return self.experts * self.expert_params

    def experts_touched(self, tokens: int) -> float:
        """Expected number of distinct experts that a batch of `tokens` uses, each token routed uniformly."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens)

    def mlp_params_touched(self, tokens: int) -> int:
        """Weights of the MLP that a batch of `tokens` reads: the dense part and the experts touched."""
        return self.mlp_params - self.routed_params + round(self.experts_touched(tokens) * self.expert_params)

    def kv_bytes(self, tokens: int, kv_dtype: str, state_dtype: str) -> int:
        """Bytes that this layer keeps for one sequence of `tokens`."""
        state = row_bytes((self.state_elements,), state_dtype) if self.state_elements else 0
        if self.kind == "linear":
            return state
        indexed = self.index_rows(tokens) * row_bytes((self.index_dim,), kv_dtype) if self.index_dim else 0
        if self.share_kv_with is not None:
            return state + indexed
        return state + indexed + self.rows(tokens, tokens) * self.row_bytes(kv_dtype)

    def row_bytes(self, kv_dtype: str) -> int:
        """Bytes of one cached row: keys and values of all KV heads, or one vector that all heads share."""
        if self.latent_dim:
            return row_bytes((self.latent_dim,), kv_dtype)
        return row_bytes((self.kv_heads, self.head_dim), kv_dtype) + row_bytes(
            (self.kv_heads, self.v_head_dim), kv_dtype
        )

    def grown_bytes(self, kv_dtype: str) -> int:
        """Bytes that one more token adds once windows are full, on average where a row stands for several tokens."""
        if self.kind in ("sliding", "linear"):
            return 0
        own = 0 if self.share_kv_with is not None else self.row_bytes(kv_dtype)
        indexed = row_bytes((self.index_dim,), kv_dtype) if self.index_dim else 0
        return (own + indexed) // (self.block_tokens or 1)

    def index_rows(self, tokens: int) -> int:
        """Keys of the indexer that a sequence of `tokens` has cached."""
        return tokens // self.block_tokens if self.kind == "compressed" else tokens

    def rows(self, tokens: int, first: int) -> int:
        """Cached rows of a sequence of `tokens`, of which the one numbered `first` (from 1) still needs its window."""
        if self.kind == "sliding":
            return min(tokens, self.window_tokens + tokens - first)
        if self.kind == "block":
            return -(-tokens // self.block_tokens)
        if self.kind == "core":
            return tokens - self.cores(first) * (self.block_tokens - 1)
        if self.kind == "compressed":
            return min(tokens, self.window_tokens + tokens - first) + tokens // self.block_tokens
        return tokens

    def cores(self, tokens: int) -> int:
        """Rows of a core layer that stand for a group of tokens each: those that the window has left behind."""
        return max(0, tokens - self.window_tokens) // self.block_tokens

    def with_heads(self, heads: int, kv_heads: int) -> LayerShape:
        """The same attention with fewer heads; its weights shrink in proportion to the vectors they produce."""
        before = self.heads * self.head_dim + self.kv_heads * (self.head_dim + self.v_head_dim)
        after = heads * self.head_dim + kv_heads * (self.head_dim + self.v_head_dim)
        if self.latent_dim:  # what is made of the latent belongs to query heads
            before, after = self.heads, heads
        qkv_params = self.whole_params - (-(self.qkv_params - self.whole_params) * after // before)
        return replace(
            self,
            heads=heads,
            kv_heads=kv_heads,
            state_elements=-(-self.state_elements * heads // self.heads),
            qkv_params=qkv_params,
            out_params=-(-self.out_params * heads // self.heads),
            qkv_stored=self.qkv_stored and self.qkv_stored.scaled(qkv_params, self.qkv_params),
            out_stored=self.out_stored and self.out_stored.scaled(heads, self.heads),
        )

    def shard(self, tp: int) -> LayerShape:
        """The part of one of `tp` tensor-parallel ranks; see `ModelShape.shard`."""
        if self.heads % tp:
            raise ValueError(f"tp={tp} does not divide the {self.heads} heads of a {self.kind} layer")
        if self.kv_heads % tp and tp % self.kv_heads:
            raise ValueError(f"tp={tp} neither divides nor is a multiple of the {self.kv_heads} KV heads")
        attention = self.with_heads(self.heads // tp, max(1, self.kv_heads // tp))
        expert_params = -(-self.expert_params // tp)
        dense_params = -(-self.dense_params // tp)
        return replace(
            attention,
            dense_stored=self.dense_stored and self.dense_stored.scaled(1, tp),
            expert_stored=self.expert_stored and self.expert_stored.scaled(1, tp),
            mlp_params=dense_params + self.experts * expert_params,
            mlp_active_params=dense_params + self.experts_per_token * expert_params,
            expert_params=expert_params,
        )


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
