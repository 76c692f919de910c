"""RetroInfer: clusters of keys in DDR, the best read exactly, the next best estimated from their means."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, pair_flops, raw_buffers, raw_prefill
from policies.model import ModelShape
from policies.plan import Access, Buffer, Compute, Copy, Count, Engine, Plan, Rows, Step, Tier, Work, part_of
from policies.policy import Policy, Reuse, at_least, multiple_of, share_of
from policies.retroinfer_index import Clusters, cluster_counts

CACHED = 3  # clusters in the HBM cache for each one that a step retrieves (the authors' scripts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetroInfer(Policy):
    """Keys are clustered at the prompt's end; each KV head reads the clusters ranked first, `retrieval` of all, and
    estimates the next ones, `estimation` of all, from a cluster's mean key and summed values. Sinks, a window and the
    generated tokens are exact; whenever `update_tokens` of these have gathered, they are clustered too.

    Clusters lie in DDR one after the other, a token's key beside its value, and are read in blocks of `block_tokens`
    (4: the 2 KiB of the authors' 8 tokens of keys alone); the last block of a cluster is read whole. An LRU cache of
    blocks in HBM has room for three times what a step retrieves, at mean cluster size; blocks are attended to where
    they lie in it. Retrieved clusters that exceed that room, the last ranks first, are estimated.

    The authors look clusters up on the CPU, which waits for the GPU in each layer, and copy all exact rows into one
    buffer; here the GPU looks up, nothing waits, and nothing is copied twice.
    """

    name: ClassVar[str] = "retroinfer"
    paper: ClassVar[str] = "RetroInfer, Chen et al. 2025, arXiv:2505.02922"
    reuse: ClassVar[Reuse] = Reuse.PREFIX
    by_shape: ClassVar[bool] = True

    sink_tokens: int = 4
    window_tokens: int = 64
    cluster_tokens: int = 16
    block_tokens: int = 4
    segment_tokens: int = 8192
    retrieval: float = 0.018
    estimation: float = 0.232
    kmeans_iterations: int = 10
    update_tokens: int = 1024

    def __post_init__(self) -> None:
        at_least(self, sink_tokens=0, window_tokens=0, cluster_tokens=1, block_tokens=1, segment_tokens=1)
        at_least(self, kmeans_iterations=1, update_tokens=1)
        multiple_of(self, "update_tokens", "cluster_tokens")
        share_of(self, "retrieval")
        if not 0 <= self.estimation <= 1 - self.retrieval:
            raise ValueError(
                f"retroinfer: estimation={self.estimation} must be from 0 to 1 - retrieval, "
                f"which is {1 - self.retrieval:g}"
            )

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """The authors build no index for less than one update beside sinks and window."""
        return self.sink_tokens + self.window_tokens + self.update_tokens

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`*_exact`: sinks, then a ring of the window and the generated tokens; the index and `cached` blocks in HBM;
        `clusters` in DDR.

        `blocks` are the rows of `clusters` from each row on, as many as a block has; the last ones reach beyond the
        last cluster. `resident` says which block a slot has, and when it was last read; `chosen` what a step reads:
        the block, its slot and its tokens.
        """
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        views = activations(model, step, layer)
        if step.prefilling:
            views += raw_buffers(model, step, layer)
            if not step.last_chunk:
                return views
        now, after = self.index(step), self._after(step)
        row = (2, shape.head_dim) if shape.head_dim == shape.v_head_dim else (shape.head_dim + shape.v_head_dim,)
        block_row, slots = (self.block_tokens, *row), heads * self.slots(now)
        exact = heads * (self.sink_tokens + self.window_tokens + min(step.generated_tokens, self.update_tokens))
        host = heads * (after.tokens + self.block_tokens - 1)
        state = (
            Buffer("k_exact", Tier.HBM, exact, (shape.head_dim,), model.kv_dtype),
            Buffer("v_exact", Tier.HBM, exact, (shape.v_head_dim,), model.kv_dtype),
            *after.buffers(shape, model.dtype),
            Buffer("cached", Tier.HBM, slots, block_row, model.kv_dtype),
            Buffer("resident", Tier.HBM, slots, (2,), "int32"),
            Buffer("clusters", Tier.DDR, host, row, model.kv_dtype),
            Buffer("blocks", Tier.DDR, heads * after.tokens, block_row, model.kv_dtype, view=True),
            Buffer("scores", Tier.HBM, shape.heads, (now.clusters,), "fp32", ring=1),
            Buffer("head_scores", Tier.HBM, heads, (now.clusters,), "fp32", ring=1),
            Buffer("chosen", Tier.HBM, slots, (3,), "int32", ring=1),
            Buffer("estimated", Tier.HBM, 1, (shape.heads, shape.v_head_dim + 1), "fp32", ring=1),
        )
        if step.last_chunk:
            return (*views, *state, Buffer("arranged", Tier.HBM, heads * after.tokens, row, model.kv_dtype, ring=1))
        if step.generated_tokens < self.update_tokens:
            return (*views, *state)
        return (*views, *state, Buffer("leaving", Tier.HBM, heads * self.update_tokens, row, model.kv_dtype, ring=1))

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense; at the end the GPU clusters the keys and puts them in order, and they leave for the host."""
        ops = raw_prefill(model, step, layer)
        if not step.last_chunk:
            return ops
        exact = Rows(model.layers[layer].kv_heads * (self.sink_tokens + self.window_tokens))
        set_aside = Compute(
            name="set_aside",
            work=Work.ELEMENTWISE,
            reads=(Access("raw_keys", exact), Access("raw_values", exact)),
            writes=(Access("k_exact", exact), Access("v_exact", exact)),
            after=("attend",),
        )
        leave = self._leave(model, step, layer, self._after(step), ("raw_keys", "raw_values"), "arranged")
        return (*ops, set_aside, *leave)

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Score all clusters, fetch what is not cached of the best while the next best are estimated, attend to all."""
        shape, heads, now = model.layers[layer], model.layers[layer].kv_heads, self.index(step)
        exact, read = self._exact_tokens(step), Rows(0, (("read", 1),))
        fetch = Copy(
            name="fetch",
            src="blocks",
            dst="cached",
            rows=Rows(0, (("miss", 1),)),
            engine=Engine.GATHER,
            ids=("chosen",),
            after=("select",),
        )
        estimate = self._estimate(model, step, layer)
        attention = Compute(
            name="attend",
            work=Work.ATTENTION,
            # Ragged heads: pairs are counted over KV heads, so the FLOPs of a pair are those of one group.
            rows=Rows(heads * exact, (("read", self.block_tokens),)),
            flops_per_row=pair_flops(shape, step) // heads,
            reads=(
                Access("q", Rows(1)),
                Access("k_exact", Rows(heads * exact)),
                Access("v_exact", Rows(heads * exact)),
                Access("cached", read, scattered=True),
                Access("chosen", read),
                *(Access("estimated", Rows(1)) for _ in estimate),
            ),
            writes=(Access("out", Rows(1)),),
            after=("append", "fetch", *(op.name for op in estimate)),
        )
        new = append(step, ("k_exact", "v_exact"), ("new_k", "new_v"), heads)
        ops = (new, *now.lookup(shape, heads * self.slots(now)), fetch, *estimate, attention)
        if step.generated_tokens % self.update_tokens:
            return ops
        added = self.update_tokens // self.cluster_tokens
        index = Clusters(self.update_tokens, added, added)
        return (*ops, *self._leave(model, step, layer, index, ("k_exact", "v_exact"), "leaving"))

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """In blocks, of the room that the cache has: `read`, those of the retrieved clusters; `miss`, of these the ones
        that are not in the cache. The hit rate is 1 - miss / read.
        """
        if step.prefilling:
            return ()
        heads, most, read = model.layers[layer].kv_heads, self.slots(self.index(step)), self.read_share
        sizes = "clusters of mean size, whose last block is half empty; the spread is an assumption"
        hits = "assumption: 85 % hits, within the 79 to 94 % that the authors are said to measure with a cache of 5 %"
        return (
            Count(name="read", heads=heads, maximum=most, share=read, spread=read / 8, source=sizes),
            Count(name="miss", heads=heads, maximum=most, share=0.15 * read, spread=0.05 * read, source=hits),
        )

    @property
    def read_share(self) -> float:
        """Blocks that a step reads for each one that the cache has room for, where clusters are of mean size."""
        return (self.cluster_tokens + (self.block_tokens - 1) / 2) / (CACHED * self._cluster_blocks * self.block_tokens)

    def slots(self, index: Clusters) -> int:
        """Blocks that the cache of a KV head holds, and that a step reads at most."""
        return CACHED * self._cluster_blocks * index.retrieved

    def index(self, step: Step) -> Clusters:
        """The clusters that the step's queries search."""
        return self._index(step, self.updates_before(step))

    def updates_before(self, step: Step) -> int:
        """How often generated tokens were clustered before the step."""
        return max(0, step.generated_tokens - 1) // self.update_tokens

    @property
    def _cluster_blocks(self) -> int:
        return -(-self.cluster_tokens // self.block_tokens)

    def _leave(
        self, model: ModelShape, step: Step, layer: int, index: Clusters, source: tuple[str, str], staged: str
    ) -> Plan:
        """Cluster the rows of `source`, put them in the order of their clusters in `staged`, and send them down."""
        shape = model.layers[layer]
        rows = Rows(shape.kv_heads * index.tokens)
        arrange = Compute(
            name="arrange",
            work=Work.ELEMENTWISE,
            reads=tuple(Access(name, rows, scattered=True) for name in source),
            writes=(Access(staged, rows),),
            after=("sum_values", "offload@-1"),
        )
        offload = Copy(name="offload", src=staged, dst="clusters", rows=rows, after=("arrange",))
        return (*index.build(shape, self.kmeans_iterations, ("attend",), *source), arrange, offload)

    def _estimate(self, model: ModelShape, step: Step, layer: int) -> Plan:
        shape, now = model.layers[layer], self.index(step)
        if not now.estimated:
            return ()
        means = Rows(shape.kv_heads * now.estimated)
        return (
            Compute(
                name="estimate",
                work=Work.ATTENTION,
                rows=Rows(now.estimated),
                flops_per_row=pair_flops(shape, step),
                reads=(
                    Access("q", Rows(1)),
                    Access("centroids", means, scattered=True),
                    Access("value_sums", means, scattered=True),
                ),
                writes=(Access("estimated", Rows(1)),),
                after=("select",),
            ),
        )

    def _index(self, step: Step, updates: int) -> Clusters:
        """The clusters of the prompt and of so many updates."""
        prompt, added = step.prompt_tokens, self.update_tokens // self.cluster_tokens
        clusters, of_segment = cluster_counts(prompt, self.cluster_tokens, self.segment_tokens)
        retrieved = max(1, part_of(clusters, self.retrieval))
        return Clusters(
            tokens=prompt - self.sink_tokens - self.window_tokens + updates * self.update_tokens,
            clusters=clusters + updates * added,
            segment_clusters=of_segment,
            retrieved=retrieved + updates * max(1, part_of(added, self.retrieval)),
            estimated=min(part_of(clusters, self.estimation), clusters - retrieved)
            + updates * part_of(added, self.estimation),
        )

    def _after(self, step: Step) -> Clusters:
        return self._index(step, step.generated_tokens // self.update_tokens)

    def _exact_tokens(self, step: Step) -> int:
        """Tokens that a step attends to exactly; an update that ends the step takes its tokens away afterwards."""
        gathered = step.generated_tokens - self.update_tokens * self.updates_before(step)
        return self.sink_tokens + self.window_tokens + gathered
