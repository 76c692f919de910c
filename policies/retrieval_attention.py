"""RetrievalAttention: nearest-neighbour search over keys in DDR, attended to by the CPU."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, raw_buffers, raw_prefill
from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Compute, Copy, Count, Plan, Processor, Rows, Step, Sync, Tier, Work
from policies.policy import Policy, Reuse, at_least, one_of, share_of
from policies.retrieval_index import FOLLOWED_EACH, Flat, Graph, Index, Ivf


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalAttention(Policy):
    """Sinks, a static window and generated tokens stay in HBM; the CPU finds `top_k` of the other keys for each query
    head and attends to them; only queries and partial outputs cross PCIe.

    `index="graph"` is the paper's query-aware graph, built from the prompt's own queries: `degree` links of each key,
    in one graph for each KV head; a search computes the distance to `scanned` of the keys, and to no fewer than
    `scan_factor` for each that it returns: 2 % of a short prompt are hardly more than `top_k` (1: the paper's own
    form). `"ivf"` scans `probe_share` of its lists, `"flat"` everything. `scan_per="query_head"` scans lists once for
    each query head, `"kv_head"` once for a group in one matrix product.
    """

    name: ClassVar[str] = "retrieval-attention"
    paper: ClassVar[str] = "RetrievalAttention, Liu et al. 2024, arXiv:2409.10516"
    reuse: ClassVar[Reuse] = Reuse.PREFIX
    by_shape: ClassVar[bool] = True

    sink_tokens: int = 128
    window_tokens: int = 512
    top_k: int = 100
    index: str = "graph"
    scanned: float = 0.02
    scan_factor: int = 5
    degree: int = 16
    lists: int = 512
    probe_share: float = 0.3
    scan_per: str = "kv_head"

    def __post_init__(self) -> None:
        at_least(self, sink_tokens=0, window_tokens=1, top_k=1, scan_factor=1, degree=2, lists=1)
        share_of(self, "scanned", "probe_share")
        one_of(self, "index", "graph", "ivf", "flat")
        one_of(self, "scan_per", "query_head", "kv_head")

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """As many keys must be left outside the sinks and the window as a search returns or the index has lists."""
        return self.sink_tokens + self.window_tokens + max(self.top_k, self.lists if self.index == "ivf" else 0)

    def indexed(self, prompt_tokens: int) -> int:
        """Keys per KV head that are searched: the prompt without sinks and window."""
        return prompt_tokens - self.sink_tokens - self.window_tokens

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`k_near`, `v_near` in HBM; fp32 keys, values and the index's links or lists in DDR.

        `padding_host` says how many of a sequence's keys are padding, which is never found: the first ones.
        """
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        views = activations(model, step, layer)
        if step.prefilling:
            views += raw_buffers(model, step, layer)
            if self.index == "graph" and not step.whole_prompt:  # the graph is built from every query of the prompt
                views += (Buffer("queries", Tier.HBM, step.tokens, (shape.heads, shape.head_dim), model.dtype),)
            if not step.last_chunk:
                return views
        near, far = heads * self._near(step), heads * self.indexed(step.prompt_tokens)
        partial = (shape.heads, shape.v_head_dim + 1)  # an output and its log-sum-exp
        index = self._index(shape, step)
        state = (
            Buffer("k_near", Tier.HBM, near, (shape.head_dim,), model.kv_dtype),
            Buffer("v_near", Tier.HBM, near, (shape.v_head_dim,), model.kv_dtype),
            Buffer("index_keys", Tier.DDR, far, (shape.head_dim,), "fp32"),
            Buffer("index_values", Tier.DDR, far, (shape.v_head_dim,), model.kv_dtype),
            Buffer("padding_host", Tier.DDR, 1, (1,), "int32"),
            Buffer("q_host", Tier.DDR, 1, (shape.heads, shape.head_dim), model.dtype, ring=1),
            Buffer("far_host", Tier.DDR, 1, partial, "fp32", ring=1),
            Buffer("far_out", Tier.HBM, 1, partial, "fp32", ring=1),
            Buffer("near_out", Tier.HBM, 1, partial, "fp32", ring=1),
            Buffer("found", Tier.DDR, shape.heads, (self.top_k, 2), "fp32", ring=1),
            *index.state(),
        )
        if not step.last_chunk:
            return (*views, *state)
        leaving = (
            Buffer("keys_fp32", Tier.HBM, far, (shape.head_dim,), "fp32", ring=1),
            Buffer("padding", Tier.HBM, 1, (1,), "int32", ring=1),
        )
        return (*views, *state, *leaving, *index.build_buffers(step))

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense; at the end of the prompt keys (as fp32) and values leave for the host, and the index is built."""
        ops = raw_prefill(model, step, layer, ("offload_values",))
        if self.index == "graph" and not step.whole_prompt:
            new = Rows(step.new_tokens)
            ops += (
                Compute(
                    name="keep_queries",
                    work=Work.ELEMENTWISE,
                    reads=(Access("q", new),),
                    writes=(Access("queries", new),),
                    after=("qkv",),
                ),
            )
        if not step.last_chunk:
            return ops
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        near, far = Rows(heads * self._near(step)), Rows(heads * self.indexed(step.prompt_tokens))
        return (
            *ops,
            Compute(
                name="split",
                work=Work.ELEMENTWISE,
                reads=(Access("raw_keys", Rows(near.fixed + far.fixed)), Access("raw_values", near)),
                writes=(
                    Access("k_near", near),
                    Access("v_near", near),
                    Access("keys_fp32", far),
                    Access("padding", Rows(1)),
                ),
                after=("attend", "offload_keys@-1", "offload_padding@-1"),
            ),
            Copy(name="offload_keys", src="keys_fp32", dst="index_keys", rows=far, after=("split",)),
            Copy(name="offload_values", src="raw_values", dst="index_values", rows=far, after=("append",)),
            Copy(name="offload_padding", src="padding", dst="padding_host", rows=Rows(1), after=("split",)),
            *self._index(shape, step).build(step),
        )

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Send the query down, search and attend on the CPU while the GPU attends to what is near, merge by LSE."""
        shape, near = model.layers[layer], self._near(step)
        near_rows, top_rows = Rows(shape.kv_heads * near), Rows(shape.heads * self.top_k)
        return (
            Copy(name="q_down", src="q", dst="q_host", rows=Rows(1), after=("qkv",)),
            append(step, ("k_near", "v_near"), ("new_k", "new_v"), shape.kv_heads),
            attend(
                shape,
                step,
                Rows(near),
                (Access("k_near", near_rows), Access("v_near", near_rows)),
                name="attend_near",
                out="near_out",
            ),
            Sync(name="wait_query", after=("q_down",)),
            self._index(shape, step).search(),
            Compute(
                name="attend_far",  # the search has the scores; what is left is to weigh the values
                work=Work.ATTENTION,
                processor=Processor.CPU,
                rows=top_rows,
                flops_per_row=2 * shape.v_head_dim,
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

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """Over the query heads of a group, what a graph search does: `visited` are keys whose distance it computes,
        `followed` those whose links it reads.
        """
        if step.prefilling or self.index != "graph":
            return ()
        shape = model.layers[layer]
        keys = self.indexed(step.prompt_tokens)
        least = self.scan_factor * self.top_k
        return (
            Count(
                name="visited",
                heads=shape.kv_heads,
                minimum=shape.group * self.top_k,
                maximum=shape.group * keys,
                share=self.scanned,
                least_mean=shape.group * least,
                spread=0.005,
                source="RetrievalAttention section 4: 1 to 3 % of keys; at least scan_factor for each key returned",
            ),
            Count(
                name="followed",
                heads=shape.kv_heads,
                maximum=shape.group * keys,
                share=self.scanned * FOLLOWED_EACH,
                least_mean=shape.group * round(least * FOLLOWED_EACH),
                spread=0.002,
                source="0.15 to 0.38 for each key visited, measured by benchmarks/retrieval_followed.py: a quarter",
            ),
        )

    def _near(self, step: Step) -> int:
        return self.sink_tokens + self.window_tokens + step.generated_tokens

    def _index(self, shape: LayerShape, step: Step) -> Index:
        keys = self.indexed(step.prompt_tokens)
        if self.index == "graph":
            return Graph(shape, keys, self.degree)
        scans = shape.group if self.scan_per == "query_head" else 1
        if self.index == "ivf":
            return Ivf(shape, keys, scans, self.lists, self.probe_share)
        return Flat(shape, keys, scans)
