"""RetroInfer: clusters of keys in DDR, the best read exactly, the next best estimated from their means."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, pair_flops, raw_buffers, raw_prefill
from policies.model import ModelShape
from policies.plan import (
    Access,
    Buffer,
    Compute,
    Copy,
    Count,
    Engine,
    Plan,
    Processor,
    Rows,
    Step,
    Sync,
    Tier,
    Work,
    part_of,
)
from policies.policy import Policy, Reuse, at_least, multiple_of, share_of
from policies.retroinfer_index import Clusters, cluster_counts

CACHED = 3  # clusters in the HBM cache for each one that a step retrieves (the authors' scripts)
BUFFERED = 4  # room in the execution buffer for each one, as clusters differ in size


@dataclass(frozen=True, slots=True, kw_only=True)
class RetroInfer(Policy):
    """Keys are clustered at the prompt's end; each KV head reads the clusters ranked first, `retrieval` of all, and
    estimates the next ones, `estimation` of all, from a cluster's mean key and summed values. Sinks, a window and the
    generated tokens are exact; whenever `update_tokens` of these have gathered, they are clustered too.

    Clusters live in DDR; an LRU cache in HBM holds three times what a step retrieves. A cluster counts as
    `cluster_tokens` tokens, its mean size; the authors' page lists, LRU bookkeeping on the CPU and copy of the exact
    rows into the execution buffer are left out.
    """

    name: ClassVar[str] = "retroinfer"
    paper: ClassVar[str] = "RetroInfer, Chen et al. 2025, arXiv:2505.02922"
    reuse: ClassVar[Reuse] = Reuse.PREFIX
    by_shape: ClassVar[bool] = True

    sink_tokens: int = 4
    window_tokens: int = 64
    cluster_tokens: int = 16
    segment_tokens: int = 8192
    retrieval: float = 0.018
    estimation: float = 0.232
    kmeans_iterations: int = 10
    update_tokens: int = 1024

    def __post_init__(self) -> None:
        at_least(self, sink_tokens=0, window_tokens=0, cluster_tokens=1, segment_tokens=1, kmeans_iterations=1)
        at_least(self, update_tokens=1)
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
        """`*_exact`: sinks, window, generated tokens; the index and `*_cached` in HBM; `*_host`: all clusters.

        `*_clusters` are the rows of `*_host`, a cluster to a row, and `*_run` what a step attends to.
        """
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        views = activations(model, step, layer)
        if step.prefilling:
            views += raw_buffers(model, step, layer)
            if not step.last_chunk:
                return views
        now, after, k, v = self._now(step), self._after(step), shape.head_dim, shape.v_head_dim
        exact, size, chosen = heads * self._exact_tokens(step), self.cluster_tokens, heads * now.retrieved
        host, run = heads * after.tokens, max(32, BUFFERED * now.retrieved)
        state = (
            Buffer("k_exact", Tier.HBM, exact, (k,), model.kv_dtype),
            Buffer("v_exact", Tier.HBM, exact, (v,), model.kv_dtype),
            Buffer("centroids", Tier.HBM, heads * after.clusters, (k,), model.dtype),
            Buffer("value_sums", Tier.HBM, heads * after.clusters, (v,), model.dtype),
            Buffer("sizes", Tier.HBM, heads, (after.clusters,), model.dtype),
            Buffer("empty", Tier.HBM, heads, (after.clusters,), "bool"),
            Buffer("k_cached", Tier.HBM, CACHED * chosen, (size, k), model.kv_dtype),
            Buffer("v_cached", Tier.HBM, CACHED * chosen, (size, v), model.kv_dtype),
            Buffer("keys_host", Tier.DDR, host, (k,), model.kv_dtype),
            Buffer("values_host", Tier.DDR, host, (v,), model.kv_dtype),
            Buffer("k_clusters", Tier.DDR, heads * after.clusters, (size, k), model.kv_dtype, view=True),
            Buffer("v_clusters", Tier.DDR, heads * after.clusters, (size, v), model.kv_dtype, view=True),
            Buffer("k_run", Tier.HBM, heads * run, (size, k), model.kv_dtype, ring=1),
            Buffer("v_run", Tier.HBM, heads * run, (size, v), model.kv_dtype, ring=1),
            Buffer("scores", Tier.HBM, shape.heads, (now.clusters,), model.dtype, ring=1),
            Buffer("head_scores", Tier.HBM, heads, (now.clusters,), model.dtype, ring=1),
            Buffer("chosen", Tier.HBM, heads, (now.retrieved,), "int64", ring=1),
            Buffer("chosen_host", Tier.DDR, heads, (now.retrieved,), "int64", ring=1),
            Buffer("estimated", Tier.HBM, 1, (shape.heads, v + 1), "fp32", ring=1),
        )
        if not step.last_chunk:
            return (*views, *state)
        staged = (
            Buffer("keys_staged", Tier.DDR, host, (k,), model.kv_dtype, ring=1),
            Buffer("values_staged", Tier.DDR, host, (v,), model.kv_dtype, ring=1),
            Buffer("members", Tier.HBM, host, (1,), "int32", ring=1),
            Buffer("members_host", Tier.DDR, host, (1,), "int32", ring=1),
        )
        return (*views, *staged, *state)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense; at the end keys and values leave for the host while the GPU clusters them, and are put in order."""
        ops = raw_prefill(model, step, layer, ("offload_keys", "offload_values"))
        if not step.last_chunk:
            return ops
        shape, heads, index = model.layers[layer], model.layers[layer].kv_heads, self._after(step)
        exact, far = Rows(heads * self._exact_tokens(step)), Rows(heads * index.tokens)
        set_aside = Compute(
            name="set_aside",
            work=Work.ELEMENTWISE,
            reads=(Access("raw_keys", exact), Access("raw_values", exact)),
            writes=(Access("k_exact", exact), Access("v_exact", exact)),
            after=("attend",),
        )
        moves = tuple(
            Copy(name=f"offload_{of}", src=f"raw_{of}", dst=f"{of}_staged", rows=far, after=("append", "arrange@-1"))
            for of in ("keys", "values")
        )
        arrange = Compute(
            name="arrange",
            work=Work.ELEMENTWISE,
            processor=Processor.CPU,
            reads=(Access("keys_staged", far), Access("values_staged", far), Access("members_host", far)),
            writes=(Access("keys_host", far, scattered=True), Access("values_host", far, scattered=True)),
            after=("offload_keys", "offload_values", "members_down"),
        )
        down = Copy(
            name="members_down", src="members", dst="members_host", rows=far, after=("list_members", "arrange@-1")
        )
        build = index.build(shape, self.kmeans_iterations, ("attend",), "raw_keys", "raw_values")
        lists = Compute(
            name="list_members",
            work=Work.ELEMENTWISE,
            writes=(Access("members", far),),
            after=("sum_values", "members_down@-1"),
        )
        return (*ops, *build, lists, set_aside, *moves, down, arrange)

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Score all clusters, fetch the best that are not cached while the next best are estimated, attend to both."""
        shape, heads, now = model.layers[layer], model.layers[layer].kv_heads, self._now(step)
        exact, chosen = Rows(heads * self._exact_tokens(step)), Rows(heads * now.retrieved)
        missed, hit = Rows(0, (("miss", 1),)), Rows(heads * now.retrieved, (("miss", -1),))
        fetch = tuple(
            Copy(
                name=f"fetch_{of}",
                src=f"{of}_clusters",
                dst=f"{of}_run",
                rows=missed,
                engine=Engine.GATHER,
                ids=("chosen_host",),
                after=("wait_ids",),
            )
            for of in ("k", "v")
        )
        assemble = Compute(
            name="assemble",
            work=Work.ELEMENTWISE,
            reads=(Access("k_cached", hit, scattered=True), Access("v_cached", hit, scattered=True)),
            writes=(Access("k_run", hit), Access("v_run", hit)),
            after=("fetch_k", "fetch_v"),  # one kernel does all three
        )
        admit = Compute(
            name="admit",  # what was missed takes the place of the clusters that were used longest ago
            work=Work.ELEMENTWISE,
            reads=(Access("k_run", missed), Access("v_run", missed)),
            writes=(Access("k_cached", missed, scattered=True), Access("v_cached", missed, scattered=True)),
            after=("attend",),
        )
        estimate = self._estimate(model, step, layer)
        runs = (Access("k_run", chosen), Access("v_run", chosen), *(Access("estimated", Rows(1)) for _ in estimate))
        return (
            append(step, ("k_exact", "v_exact"), ("new_k", "new_v"), heads),
            *now.lookup(shape),
            Copy(name="ids_down", src="chosen", dst="chosen_host", rows=Rows(heads), after=("select",)),
            Sync(name="wait_ids", after=("ids_down",)),
            *fetch,
            *estimate,
            assemble,
            attend(
                shape,
                step,
                Rows(self._exact_tokens(step) + self.cluster_tokens * now.retrieved),
                (Access("k_exact", exact), Access("v_exact", exact), *runs),
                after=("append", "fetch_k", "fetch_v", "assemble", *(op.name for op in estimate)),
            ),
            admit,
            *self._update(model, step, layer),
        )

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`miss`: retrieved clusters that are not in the HBM cache."""
        if step.prefilling:
            return ()
        heads, most = model.layers[layer].kv_heads, self._now(step).retrieved
        source = "assumption: 85 % hits, within the 79 to 94 % that the authors are said to measure with a cache of 5 %"
        return (Count(name="miss", heads=heads, maximum=most, share=0.15, spread=0.05, source=source),)

    def _estimate(self, model: ModelShape, step: Step, layer: int) -> Plan:
        shape, now = model.layers[layer], self._now(step)
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

    def _update(self, model: ModelShape, step: Step, layer: int) -> Plan:
        if step.generated_tokens % self.update_tokens:
            return ()
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        clusters = self.update_tokens // self.cluster_tokens
        moved = Rows(heads * self.update_tokens)
        build = Clusters(self.update_tokens, clusters, clusters).build(
            shape, self.kmeans_iterations, ("attend",), "k_exact", "v_exact"
        )
        moves = tuple(
            Copy(name=f"offload_{of}", src=f"{of[0]}_exact", dst=f"{of}_host", rows=moved, after=("sum_values",))
            for of in ("keys", "values")
        )
        return (*build, *moves)

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

    def _now(self, step: Step) -> Clusters:
        """What the step's queries search."""
        return self._index(step, self._updates_before(step))

    def _after(self, step: Step) -> Clusters:
        return self._index(step, step.generated_tokens // self.update_tokens)

    def _updates_before(self, step: Step) -> int:
        return max(0, step.generated_tokens - 1) // self.update_tokens

    def _exact_tokens(self, step: Step) -> int:
        """Rows that a step attends to exactly; an update that ends the step takes its tokens away afterwards."""
        gathered = step.generated_tokens - self.update_tokens * self._updates_before(step)
        return self.sink_tokens + self.window_tokens + gathered
