"""RetrievalAttention: nearest-neighbour search over keys in DDR, attended to by the CPU."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, raw_buffers, raw_prefill
from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Compute, Copy, Count, Plan, Processor, Rows, Step, Sync, Tier, Work, part_of
from policies.policy import Policy, Reuse, at_least, one_of, share_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalAttention(Policy):
    """Sinks, a static window and generated tokens stay in HBM; the CPU finds `top_k` of the other keys for each query
    head and attends to them; only queries and partial outputs cross PCIe.

    `index="graph"` is the paper's query-aware graph, of `degree` neighbours a key for each query head, built from the
    prompt's own queries; a search computes the distance to `scanned` of the keys. `"ivf"` scans `probe_share` of its
    lists, `"flat"` everything. `scan_per="query_head"` scans lists once for each query head, `"kv_head"` once for a
    group in one matrix product.
    """

    name: ClassVar[str] = "retrieval-attention"
    paper: ClassVar[str] = "RetrievalAttention, Liu et al. 2024, arXiv:2409.10516"
    reuse: ClassVar[Reuse] = Reuse.PREFIX

    sink_tokens: int = 128
    window_tokens: int = 512
    top_k: int = 100
    index: str = "graph"
    scanned: float = 0.02
    degree: int = 32
    lists: int = 512
    probe_share: float = 0.3
    scan_per: str = "kv_head"

    def __post_init__(self) -> None:
        at_least(self, sink_tokens=0, window_tokens=1, top_k=1, degree=1, lists=1)
        share_of(self, "scanned", "probe_share")
        one_of(self, "index", "graph", "ivf", "flat")
        one_of(self, "scan_per", "query_head", "kv_head")

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """Something must be left outside the sinks and the window."""
        return self.sink_tokens + self.window_tokens + self.top_k

    def indexed(self, prompt_tokens: int) -> int:
        """Keys per KV head that are searched: the prompt without sinks and window."""
        return prompt_tokens - self.sink_tokens - self.window_tokens

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`k_near`, `v_near` in HBM; fp32 keys, values and the index's pointers or centroids in DDR."""
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        views = activations(model, step, layer)
        if step.prefilling and not step.last_chunk:
            return (*views, *raw_buffers(model, step, layer))
        near, far = heads * self._near(step), heads * self.indexed(step.prompt_tokens)
        state = [
            Buffer("k_near", Tier.HBM, near, (shape.head_dim,), model.kv_dtype),
            Buffer("v_near", Tier.HBM, near, (shape.v_head_dim,), model.kv_dtype),
            Buffer("index_keys", Tier.DDR, far, (shape.head_dim,), "fp32"),
            Buffer("index_values", Tier.DDR, far, (shape.v_head_dim,), model.kv_dtype),
            Buffer("q_host", Tier.DDR, 1, (shape.heads, shape.head_dim), model.dtype, ring=1),
            Buffer("far_host", Tier.DDR, 1, (shape.heads, shape.v_head_dim + 1), "fp32", ring=1),
            Buffer("far_out", Tier.HBM, 1, (shape.heads, shape.v_head_dim + 1), "fp32", ring=1),
            Buffer("near_out", Tier.HBM, 1, (shape.heads, shape.v_head_dim + 1), "fp32", ring=1),
            Buffer("found", Tier.DDR, shape.heads, (self.top_k, 2), "fp32", ring=1),
        ]
        if self.index == "graph":
            rows = shape.heads * self.indexed(step.prompt_tokens)
            state.append(Buffer("graph", Tier.DDR, rows, (self.degree,), "int32"))
        elif self.index == "ivf":
            state.append(Buffer("list_centroids", Tier.DDR, heads * self.lists, (shape.head_dim,), "fp32"))
            state.append(Buffer("list_ids", Tier.DDR, far, (1,), "int32"))
        if not step.last_chunk:
            return (*views, *state)
        cast = Buffer("keys_fp32", Tier.HBM, far, (shape.head_dim,), "fp32", ring=1)
        links = Buffer("neighbours", Tier.HBM, shape.heads * step.prompt_tokens, (self.degree,), "int32", ring=1)
        links_host = Buffer("neighbours_host", Tier.DDR, links.rows, (self.degree,), "int32", ring=1)
        extra = (cast, links, links_host) if self.index == "graph" else (cast,)
        return (*views, *raw_buffers(model, step, layer), *state, *extra)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense; at the end of the prompt keys (as fp32) and values leave for the host, which builds the index."""
        ops = raw_prefill(model, step, layer)
        if not step.last_chunk:
            return ops
        shape, heads, prompt = model.layers[layer], model.layers[layer].kv_heads, step.prompt_tokens
        indexed, near = self.indexed(prompt), Rows(heads * self._near(step))
        far = Rows(heads * indexed)
        return (
            *ops,
            Compute(
                name="split",
                work=Work.ELEMENTWISE,
                reads=(Access("raw_keys", Rows(heads * prompt)), Access("raw_values", near)),
                writes=(Access("k_near", near), Access("v_near", near), Access("keys_fp32", far)),
                after=("attend",),
            ),
            Copy(name="offload_keys", src="keys_fp32", dst="index_keys", rows=far, after=("split",)),
            Copy(name="offload_values", src="raw_values", dst="index_values", rows=far, after=("split",)),
            *self._build(shape, prompt),
        )

    def _build(self, shape: LayerShape, prompt: int) -> Plan:
        indexed, heads = self.indexed(prompt), shape.kv_heads
        links = Rows(shape.heads * prompt)
        if self.index == "flat":
            return ()
        if self.index == "ivf":  # ten rounds of k-means over the lists, on the host
            rounds = Rows(10 * heads * indexed)
            return (
                Compute(
                    name="build",
                    work=Work.FACTOR,
                    processor=Processor.CPU,
                    rows=rounds,
                    flops_per_row=2 * self.lists * shape.head_dim,
                    reads=(Access("index_keys", rounds),),
                    writes=(Access("list_centroids", Rows(heads * self.lists)), Access("list_ids", Rows(heads * indexed))),
                    after=("offload_keys",),
                ),
            )
        return (
            Compute(
                name="neighbours",  # each prompt query's exact nearest keys: the bipartite graph
                work=Work.MATMUL,
                rows=Rows(prompt * indexed),
                flops_per_row=2 * shape.heads * shape.head_dim,
                reads=(Access("raw_keys", Rows(heads * indexed)),),
                writes=(Access("neighbours", links),),
                after=("attend",),
            ),
            Copy(name="neighbours_down", src="neighbours", dst="neighbours_host", rows=links, after=("neighbours",)),
            Compute(
                name="build",  # project onto keys: link keys that one query found together, prune by distance
                work=Work.FACTOR,
                processor=Processor.CPU,
                rows=Rows(shape.heads * indexed),
                flops_per_row=2 * shape.head_dim * self.degree,
                reads=(Access("neighbours_host", links), Access("index_keys", Rows(shape.heads * indexed), scattered=True)),
                writes=(Access("graph", Rows(shape.heads * indexed)),),
                after=("neighbours_down", "offload_keys"),
            ),
        )

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Send the query down, search and attend on the CPU while the GPU attends to what is near, merge by LSE."""
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        near = self._near(step)
        near_rows = Rows(heads * near)
        top_rows = Rows(shape.heads * self.top_k)
        return (
            Copy(name="q_down", src="q", dst="q_host", rows=Rows(1), after=("qkv",)),
            append(step, ("k_near", "v_near"), ("new_k", "new_v"), heads),
            attend(
                shape,
                step,
                Rows(near),
                (Access("k_near", near_rows), Access("v_near", near_rows)),
                name="attend_near",
                out="near_out",
            ),
            Sync(name="wait_query", after=("q_down",)),
            self._search(shape, step.prompt_tokens),
            Compute(
                name="attend_far",
                work=Work.ATTENTION,
                processor=Processor.CPU,
                rows=top_rows,
                flops_per_row=2 * (shape.head_dim + shape.v_head_dim),
                reads=(Access("found", Rows(shape.heads)), Access("index_values", top_rows, scattered=True)),
                writes=(Access("far_host", Rows(1)),),
                after=("search",),
            ),
            Copy(name="out_up", src="far_host", dst="far_out", rows=Rows(1), after=("attend_far",)),
            Compute(
                name="attend",
                work=Work.ELEMENTWISE,
                rows=Rows(shape.heads),
                flops_per_row=4 * shape.v_head_dim,
                reads=(Access("near_out", Rows(1)), Access("far_out", Rows(1))),
                writes=(Access("out", Rows(1)),),
                after=("attend_near", "out_up"),
            ),
        )

    def _search(self, shape: LayerShape, prompt_tokens: int) -> Compute:
        indexed, heads = self.indexed(prompt_tokens), shape.kv_heads
        found = (Access("found", Rows(shape.heads)),)
        if self.index == "graph":
            visited = Rows(0, (("visited", 1),))
            expanded = Rows(shape.heads * self.top_k)  # a search expands about as many nodes as it returns
            return Compute(
                name="search",
                work=Work.MATMUL,
                processor=Processor.CPU,
                rows=visited,
                flops_per_row=2 * shape.head_dim,
                reads=(Access("index_keys", visited, scattered=True), Access("graph", expanded, scattered=True)),
                writes=found,
                after=("wait_query",),
                draws=("visited",),
            )
        scans = shape.group if self.scan_per == "query_head" else 1
        keys = part_of(indexed, self.probe_share) if self.index == "ivf" else indexed
        lists = (Access("list_centroids", Rows(heads * self.lists * scans)),) if self.index == "ivf" else ()
        return Compute(
            name="search",
            work=Work.MATMUL,
            processor=Processor.CPU,
            rows=Rows(shape.heads * keys),
            flops_per_row=2 * shape.head_dim,
            reads=(Access("index_keys", Rows(heads * scans * keys)), *lists),
            writes=found,
            after=("wait_query",),
        )

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`visited`: keys whose distance a graph search computes, over the query heads of a group."""
        if step.prefilling or self.index != "graph":
            return ()
        shape = model.layers[layer]
        maximum, source = shape.group * self.indexed(step.prompt_tokens), "RetrievalAttention section 4: 1 to 3 % of keys"
        return (
            Count(name="visited", heads=shape.kv_heads, maximum=maximum, share=self.scanned, spread=0.005, source=source),
        )

    def _near(self, step: Step) -> int:
        return self.sink_tokens + self.window_tokens + step.generated_tokens
