"""Locret: trained heads say which entries of the cache matter; the others are evicted while the prompt is read."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, held_pairs
from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Compute, Plan, Rows, Step, Tier, Work
from policies.policy import Policy, Reuse, at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class Locret(Policy):
    """A prompt is read in chunks of `chunk_tokens`; after each, a KV head keeps the `budget_tokens` scored highest.

    A two-layer network of `hidden_dim` on a token's query, key and value gives its score, once. The prompt's last
    `local_tokens` and all generated tokens stay. So do, within the budget, the first `sink_tokens` (0: the paper's
    own form) and, until the next chunk, a chunk's last `stabilizer_tokens`: they change what is kept and not how
    much. Keys are stored unrotated and rotated at their place in the cache.
    """

    name: ClassVar[str] = "locret"
    paper: ClassVar[str] = "Locret, Huang et al. 2024, arXiv:2410.01805"
    trained: ClassVar[str] = "retaining heads: two linear layers in each layer, trained for the model"
    reuse: ClassVar[Reuse] = Reuse.PREFIX
    verifies: ClassVar[bool] = True
    by_shape: ClassVar[bool] = True

    budget_tokens: int = 6000
    local_tokens: int = 100
    chunk_tokens: int = 3072
    stabilizer_tokens: int = 2500
    hidden_dim: int = 1024
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        at_least(
            self, budget_tokens=1, local_tokens=0, chunk_tokens=1, stabilizer_tokens=0, hidden_dim=1, sink_tokens=0
        )
        most = min(self.budget_tokens - self.sink_tokens, self.chunk_tokens)
        if most < 0:
            raise ValueError(f"locret: sink_tokens={self.sink_tokens} must fit budget_tokens={self.budget_tokens}")
        if self.stabilizer_tokens > most:
            raise ValueError(
                f"locret: stabilizer_tokens={self.stabilizer_tokens} must fit chunk_tokens={self.chunk_tokens} and, "
                f"beside the sinks, budget_tokens={self.budget_tokens}; use {most} or fewer"
            )

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """Shorter prompts are kept whole."""
        return self.budget_tokens + self.local_tokens + 1

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`keys`, `values`, `importance`: a row per token kept and head; `chunk_*`: a chunk before its eviction.

        The retaining head's weights, which all sequences share, come as a view.
        """
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        held, chunk = heads * self._held(step), heads * min(step.new_tokens, self.chunk_tokens)
        state = (
            Buffer("keys", Tier.HBM, held, (shape.head_dim,), model.kv_dtype),
            Buffer("values", Tier.HBM, held, (shape.v_head_dim,), model.kv_dtype),
            Buffer("importance", Tier.HBM, held, (1,), model.dtype),
        )
        views = activations(model, step, layer)
        if not step.prefilling:
            return (*views, *state)
        return (
            *views,
            Buffer("retaining_head", Tier.HBM, 1, (self._head_params(shape),), model.dtype, view=True),
            Buffer("chunk_keys", Tier.HBM, chunk, (shape.head_dim,), model.kv_dtype, ring=1),
            Buffer("chunk_values", Tier.HBM, chunk, (shape.v_head_dim,), model.kv_dtype, ring=1),
            *state,
        )

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Each chunk attends to itself and to what is kept, is scored, and then the best of both stay."""
        shape, heads, new = model.layers[layer], model.layers[layer].kv_heads, step.new_tokens
        evictions = self._evictions(step, step.tokens) - self._evictions(step, step.past_tokens)
        # Every chunk reads what was kept of those before it, at most the budget.
        kept = Rows(heads * (evictions + 1) * min(step.past_tokens + new, self.budget_tokens))
        chunk = (Access("chunk_keys", Rows(heads * new)), Access("chunk_values", Rows(heads * new)))
        stays = Rows(heads * (evictions * self.budget_tokens + new))
        return (
            append(step, ("chunk_keys", "chunk_values"), ("new_k", "new_v"), heads),
            Compute(
                name="retain",
                work=Work.MATMUL,
                rows=Rows(new),
                flops_per_row=2 * self._head_params(shape),
                reads=(
                    Access("q", Rows(new)),
                    Access("new_k", Rows(new)),
                    Access("new_v", Rows(new)),
                    Access("retaining_head", Rows(1)),
                ),
                writes=(Access("importance", Rows(heads * new)),),
                after=("qkv",),
            ),
            attend(
                shape,
                step,
                Rows(self._pairs(step, step.tokens) - self._pairs(step, step.past_tokens)),
                (*chunk, Access("keys", kept), Access("values", kept)),
            ),
            Compute(
                name="select",
                work=Work.TOPK,
                rows=Rows(heads * evictions * (self.budget_tokens + self.chunk_tokens)),
                after=("retain", "attend"),
            ),
            Compute(
                name="compact",
                work=Work.ELEMENTWISE,
                reads=(*chunk, Access("keys", kept, scattered=True), Access("values", kept, scattered=True)),
                writes=(Access("keys", stays), Access("values", stays)),
                after=("select",),
            ),
        )

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense over what was kept and over all generated tokens."""
        shape, heads, held = model.layers[layer], model.layers[layer].kv_heads, self._held(step)
        rotate = Compute(
            name="rotate",  # in registers while the keys are read
            work=Work.ELEMENTWISE,
            rows=Rows(held),
            flops_per_row=3 * heads * shape.head_dim,
            after=("append",),
            launches=0,
        )
        rows = Rows(heads * held)
        reads = (Access("keys", rows), Access("values", rows))
        new = append(step, ("keys", "values"), ("new_k", "new_v"), heads)
        return (new, rotate, attend(shape, step, Rows(held_pairs(step, held)), reads, after=("rotate",)))

    def _head_params(self, shape: LayerShape) -> int:
        inputs = (shape.heads + shape.kv_heads) * shape.head_dim + shape.kv_heads * shape.v_head_dim
        return self.hidden_dim * (inputs + shape.kv_heads)

    def _scored(self, step: Step) -> int:
        """Tokens of the prompt that may be evicted."""
        return step.prompt_tokens - self.local_tokens

    def _held(self, step: Step) -> int:
        """Tokens kept after the step, per KV head."""
        scored, tokens = self._scored(step), step.tokens
        if tokens >= scored:
            return min(scored, self.budget_tokens) + tokens - scored
        return min(tokens // self.chunk_tokens * self.chunk_tokens, self.budget_tokens) + tokens % self.chunk_tokens

    def _evictions(self, step: Step, tokens: int) -> int:
        """Chunks among the first `tokens` that ended with more than the budget."""
        scored, chunk = self._scored(step), self.chunk_tokens
        full = max(0, min(tokens, scored) // chunk - self.budget_tokens // chunk)
        return full + (1 if tokens >= scored and scored % chunk and scored > self.budget_tokens else 0)

    def _pairs(self, step: Step, tokens: int) -> int:
        """Query-key pairs of the first `tokens` tokens; chunks are cut at multiples of their size."""
        chunk, budget, scored = self.chunk_tokens, self.budget_tokens, min(tokens, self._scored(step))
        chunks, rest, local = scored // chunk, scored % chunk, tokens - scored
        growing = min(chunks, -(-budget // chunk))  # chunks that begin before the budget is full
        earlier = chunk * chunk * (growing * (growing - 1) // 2) + chunk * (chunks - growing) * budget
        own = chunks * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2 + local * (local + 1) // 2
        return earlier + rest * min(chunks * chunk, budget) + local * min(self._scored(step), budget) + own
