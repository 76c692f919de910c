"""The shape of a decoder layer: its attention, what that caches, and the weights of each part."""

from __future__ import annotations

from dataclasses import dataclass, replace

from policies.dtypes import row_bytes
from policies.shown import shown
from policies.weight_formats import Stored

MOST_HEAD_DIMS = 2**20
"""Of a layer's heads times their dimensions: FLOPs and bytes fit 64 bits up to there."""

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
