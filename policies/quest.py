"""Quest: bounds on the keys of each page choose the pages that a query reads."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, causal_pairs
from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Compute, Count, Plan, Rows, Step, Tier, Work, pieces_of
from policies.policy import Policy, Reuse, at_least, multiple_of, one_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(Policy):
    """Everything stays in HBM; each step reads the `budget_tokens` of pages whose score bound is highest.

    The budget includes the last page, which is always read (the authors' kernel), and the pages of the first
    `sink_tokens`, which are always chosen (0: the paper's own form). `per="kv_head"` takes the largest bound over the
    query heads of a group; `"query_head"` lets each choose, so a group reads all that any of them chose.
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "Quest, Tang et al. 2024, arXiv:2406.10774"
    reuse: ClassVar[Reuse] = Reuse.BLOCKS

    budget_tokens: int = 2048
    page_tokens: int = 16
    dense_layers: int = 2
    sink_tokens: int = 4
    per: str = "kv_head"

    def __post_init__(self) -> None:
        at_least(self, page_tokens=1, budget_tokens=1, dense_layers=0, sink_tokens=0)
        multiple_of(self, "budget_tokens", "page_tokens")
        sinks = pieces_of(self.sink_tokens, self.page_tokens)
        if sinks and self.chosen_pages < sinks:
            raise ValueError(
                f"quest: budget_tokens={self.budget_tokens} must hold the last page and the {sinks} that "
                f"sink_tokens={self.sink_tokens} can lie on; use "
                f"{(sinks + 1) * self.page_tokens} or more, or sink_tokens=0"
            )
        one_of(self, "per", "kv_head", "query_head")

    @property
    def chosen_pages(self) -> int:
        """Pages that a head, or a KV head, chooses by their bounds; the last page is read beside them."""
        return self.budget_tokens // self.page_tokens - 1

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`keys`, `values`: whole pages, one row per token and KV head; `bounds`: two key vectors per page and head."""
        shape, pages = model.layers[layer], self._pages(step)
        rows = shape.kv_heads * pages * self.page_tokens
        stored = (
            Buffer("keys", Tier.HBM, rows, (shape.head_dim,), model.kv_dtype),
            Buffer("values", Tier.HBM, rows, (shape.v_head_dim,), model.kv_dtype),
        )
        if layer < self.dense_layers:
            return (*activations(model, step, layer), *stored)
        bounds = Buffer("bounds", Tier.HBM, shape.kv_heads * pages, (2, shape.head_dim), model.dtype)
        if step.prefilling:
            return (*activations(model, step, layer), *stored, bounds)
        scores = Buffer("scores", Tier.HBM, shape.heads, (pages,), "fp32", ring=1)
        return (*activations(model, step, layer), *stored, bounds, scores)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense; the bounds of the pages that the chunk touches are updated."""
        pairs = causal_pairs(step.past_tokens, step.new_tokens)
        return self._dense(model, step, layer, pairs)

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Update the last page's bounds, score all pages, read the best; all of them while they fit the budget."""
        shape, pages = model.layers[layer], self._pages(step)
        if layer < self.dense_layers or pages <= self.chosen_pages + 1:
            return self._dense(model, step, layer, step.tokens)
        chosen = self.chosen_pages * self.page_tokens
        last = step.tokens - (pages - 1) * self.page_tokens
        score = Compute(
            name="score",
            work=Work.MATMUL,
            rows=Rows(pages),
            flops_per_row=4 * shape.heads * shape.head_dim,
            reads=(Access("q", Rows(1)), Access("bounds", Rows(shape.kv_heads * pages))),
            writes=(Access("scores", Rows(shape.heads)),),
            after=("bound",),
        )
        select = Compute(
            name="select",
            work=Work.TOPK,
            rows=Rows((shape.heads if self._each(shape) else shape.kv_heads) * (pages - 1)),
            reads=(Access("scores", Rows(shape.heads)),),
            after=("score",),
            draws=("added",) if self._each(shape) else (),
        )
        added = (("added", self.page_tokens),) if self._each(shape) else ()
        read = Rows(shape.kv_heads * (chosen + last), added)
        keys_and_values = tuple(Access(name, read, scattered=True) for name in ("keys", "values"))
        sparse = attend(shape, step, Rows(chosen + last), keys_and_values, after=("append", "select"))
        return (*self._append(model, step, layer), score, select, sparse)

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`added`: pages that a group's other query heads choose beside those of its first one."""
        shape, pages = model.layers[layer], self._pages(step)
        chosen = self.chosen_pages
        if step.prefilling or layer < self.dense_layers or pages <= chosen + 1 or not self._each(shape):
            return ()
        maximum = min((shape.group - 1) * chosen, pages - 1 - chosen)
        source = "assumption: the heads of a group share a third of their pages; no published figure"
        return (Count(name="added", heads=shape.kv_heads, maximum=maximum, share=0.67, spread=0.1, source=source),)

    def _each(self, shape: LayerShape) -> bool:
        return self.per == "query_head" and shape.group > 1

    def _pages(self, step: Step) -> int:
        return -(-step.tokens // self.page_tokens)

    def _append(self, model: ModelShape, step: Step, layer: int) -> tuple[Compute, ...]:
        shape = model.layers[layer]
        new = append(step, ("keys", "values"), ("new_k", "new_v"), shape.kv_heads)
        if layer < self.dense_layers:
            return (new,)
        touched = self._pages(step) - step.past_tokens // self.page_tokens
        bound = Compute(
            name="bound",
            work=Work.ELEMENTWISE,
            rows=Rows(step.new_tokens),
            flops_per_row=2 * shape.kv_heads * shape.head_dim,
            reads=(Access("new_k", Rows(step.new_tokens)),),
            writes=(Access("bounds", Rows(shape.kv_heads * touched)),),
            after=("qkv",),
            launches=0,
        )
        return (new, bound)

    def _dense(self, model: ModelShape, step: Step, layer: int, pairs: int) -> Plan:
        shape = model.layers[layer]
        held = Rows(shape.kv_heads * step.tokens)
        keys_and_values = (Access("keys", held), Access("values", held))
        return (*self._append(model, step, layer), attend(shape, step, Rows(pairs), keys_and_values))
