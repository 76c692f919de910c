"""SnapKV: at the end of the prompt keep only what the last queries looked at."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, held_pairs, raw_buffers, raw_prefill
from policies.model import ModelShape
from policies.plan import Access, Buffer, Compute, Plan, Rows, Step, Tier, Work
from policies.policy import Policy, at_least, one_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(Policy):
    """Keeps `budget_tokens` of the prompt: the last `observation_tokens`, the first `sink_tokens` (0: the paper's own
    form) and, pooled, what the last ones attended to most.

    `per="kv_head"` averages the queries of a group and stores KV heads (kvpress); `"query_head"` selects for each
    query head and stores all of them, as the authors' code does, which costs the group size in memory. `pooling` is
    over `kernel_tokens` neighbours: `"average"` (the default of the authors' code and of kvpress) or `"max"` (the
    authors' LongBench settings, with 7), which keeps what stands around a peak.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV, Li et al. 2024, arXiv:2404.14469"
    verifies: ClassVar[bool] = True
    by_shape: ClassVar[bool] = True

    budget_tokens: int = 2048
    observation_tokens: int = 32
    kernel_tokens: int = 5
    pooling: str = "average"
    per: str = "kv_head"
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        at_least(self, observation_tokens=1, kernel_tokens=1, sink_tokens=0)
        at_least(self, budget_tokens=self.observation_tokens + max(1, self.sink_tokens))
        one_of(self, "pooling", "average", "max")
        one_of(self, "per", "kv_head", "query_head")
        if self.kernel_tokens % 2 == 0:
            raise ValueError(
                f"snapkv: kernel_tokens={self.kernel_tokens} must be odd, so that pooling keeps the length"
            )

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """Prompts shorter than the budget are left whole."""
        return self.budget_tokens

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """Raw keys and values until the prompt is complete, then `keys` and `values`, one row per token and head."""
        shape = model.layers[layer]
        kept = self._heads(model, layer) * (self.budget_tokens + step.generated_tokens)
        compressed = (
            Buffer("keys", Tier.HBM, kept, (shape.head_dim,), model.kv_dtype),
            Buffer("values", Tier.HBM, kept, (shape.v_head_dim,), model.kv_dtype),
        )
        if not step.prefilling:
            return (*activations(model, step, layer), *compressed)
        raw = (*activations(model, step, layer), *raw_buffers(model, step, layer))
        if self._early_queries(step):
            raw += (Buffer("early_q", Tier.HBM, self.observation_tokens, (shape.heads, shape.head_dim), model.dtype),)
        if not step.last_chunk:
            return raw
        scores = Buffer("scores", Tier.HBM, shape.heads * self.observation_tokens, (step.tokens,), "fp32", ring=1)
        return (*raw, scores, *compressed)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense; at the end the last queries score all keys, scores are summed and pooled, the best gathered.

        Where the last chunk is shorter than the observation window, the chunks before it leave their part of its
        queries, so that the choice does not depend on how a prompt was cut.
        """
        ops = raw_prefill(model, step, layer)
        shape, tokens, window = model.layers[layer], step.tokens, self.observation_tokens
        early = Rows(self._early_queries(step))
        if not step.last_chunk:
            if not early.fixed:
                return ops
            keep = Compute(
                name="keep_queries",
                work=Work.ELEMENTWISE,
                reads=(Access("q", early),),
                writes=(Access("early_q", early),),
                after=("qkv",),
            )
            return (*ops, keep)
        kept = Rows(self._heads(model, layer) * (self.budget_tokens + step.generated_tokens))
        rows = Rows(shape.heads * window)
        return (
            *ops,
            Compute(
                name="observe",
                work=Work.MATMUL,
                rows=Rows(window * tokens),
                flops_per_row=2 * shape.heads * shape.head_dim,
                reads=(
                    Access("q", Rows(min(window, step.new_tokens))),
                    *((Access("early_q", early),) if early.fixed else ()),
                    Access("raw_keys", Rows(shape.kv_heads * tokens)),
                ),
                writes=(Access("scores", rows),),
                after=("attend",),
            ),
            Compute(
                name="pool",  # softmax over the keys, sum over the window, pooling
                work=Work.ELEMENTWISE,
                rows=Rows(shape.heads * tokens),
                flops_per_row=window + self.kernel_tokens,
                reads=(Access("scores", rows),),
                after=("observe",),
            ),
            Compute(name="select", work=Work.TOPK, rows=Rows(self._heads(model, layer) * tokens), after=("pool",)),
            Compute(
                name="compress",
                work=Work.ELEMENTWISE,
                reads=(Access("raw_keys", kept, scattered=True), Access("raw_values", kept, scattered=True)),
                writes=(Access("keys", kept), Access("values", kept)),
                after=("select",),
            ),
        )

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense over what was kept and over all generated tokens."""
        shape, heads = model.layers[layer], self._heads(model, layer)
        held = self.budget_tokens + step.generated_tokens
        return (
            append(step, ("keys", "values"), ("new_k", "new_v"), heads),
            attend(
                shape,
                step,
                Rows(held_pairs(step, held)),
                (Access("keys", Rows(heads * held)), Access("values", Rows(heads * held))),
            ),
        )

    def _early_queries(self, step: Step) -> int:
        """Queries of the observation window that earlier chunks have left, or that this one leaves to the last."""
        first = step.prompt_tokens - self.observation_tokens
        return max(0, step.past_tokens - first if step.last_chunk else min(step.new_tokens, step.tokens - first))

    def _heads(self, model: ModelShape, layer: int) -> int:
        shape = model.layers[layer]
        return shape.kv_heads if self.per == "kv_head" else shape.heads
