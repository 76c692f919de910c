"""HiP: a query searches the keys by halving chunks, and the masks that it finds are kept for some steps."""

from dataclasses import dataclass, replace
from typing import ClassVar

from policies.dense import activations, append, attend, windowed_pairs
from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Compute, Count, Plan, Rows, Step, Tier, Work
from policies.policy import Policy, Reuse, at_least, multiple_of

BOUNDLESS = 1 << 40  # tokens that no context has


@dataclass(frozen=True, slots=True, kw_only=True)
class HiP(Policy):
    """Each query head attends to sinks, a window and the `top_k` tokens that three stages of halving leave over.

    A stage halves each of its chunks down to one key, scoring a key of each half; the tokens of the best chunks go on
    to smaller chunks. The raw keys are the index. A decode step repeats stage i when `refresh_i` divides its number,
    and with it all later stages. In a prompt `block_queries` queries share a mask, and every `query_stride`-th of them
    scores. Cached in HBM; the offloaded form of InfiniteHiP is not planned here.
    """

    name: ClassVar[str] = "hip"
    paper: ClassVar[str] = "InfiniteHiP, Lee et al. 2025, arXiv:2502.08910"
    reuse: ClassVar[Reuse] = Reuse.BLOCKS
    by_shape: ClassVar[bool] = True

    sink_tokens: int = 256
    window_tokens: int = 1024
    top_k: int = 2048
    chunk_1: int = 256
    chunk_2: int = 32
    chunk_3: int = 8
    tokens_2: int = 32768
    tokens_3: int = 8192
    refresh_1: int = 32
    refresh_2: int = 16
    refresh_3: int = 8
    block_queries: int = 64
    query_stride: int = 4

    def __post_init__(self) -> None:
        at_least(self, sink_tokens=0, window_tokens=1, top_k=1, chunk_3=1, refresh_3=1, query_stride=1)
        for field, divisor in (
            *(("chunk_1", "chunk_2"), ("chunk_2", "chunk_3"), ("tokens_2", "chunk_2"), ("tokens_3", "chunk_3")),
            *(("top_k", "chunk_3"), ("refresh_1", "refresh_2"), ("refresh_2", "refresh_3")),
            ("block_queries", "query_stride"),
        ):
            at_least(self, **{field: 1})
            multiple_of(self, field, divisor)
        if not self.tokens_2 >= self.tokens_3 >= self.top_k:
            raise ValueError(
                f"hip: tokens_2={self.tokens_2}, tokens_3={self.tokens_3}, top_k={self.top_k} must not grow: "
                "each stage chooses among what the one before left over"
            )

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """Shorter prompts have nothing to leave out."""
        return self.sink_tokens + self.window_tokens + self.top_k + 1

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`keys`, `values`: one row per token and head; `ids_*`: what each stage chose, per query head."""
        shape = model.layers[layer]
        rows = shape.kv_heads * step.tokens
        chosen = (self.tokens_2 // self.chunk_2, self.tokens_3 // self.chunk_3, self.top_k // self.chunk_3)
        return (
            *activations(model, step, layer),
            Buffer("keys", Tier.HBM, rows, (shape.head_dim,), model.kv_dtype),
            Buffer("values", Tier.HBM, rows, (shape.v_head_dim,), model.kv_dtype),
            *(Buffer(f"ids_{i}", Tier.HBM, shape.heads, (ids,), "int32") for i, ids in enumerate(chosen, 1)),
        )

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """All stages for each block of queries, then attention to what they chose."""
        shape, past, new = model.layers[layer], step.past_tokens, step.new_tokens
        near = self.sink_tokens + self.window_tokens
        stages: Plan = ()
        for number, chunk, most in self._stages():
            # Candidates summed over the queries, by blocks that share them and by chunks.
            candidates = windowed_pairs(past, new, near + most) - windowed_pairs(past, new, near)
            chunks = candidates // (self.block_queries * chunk)
            queries = self.block_queries // self.query_stride
            stages += self._stage(shape, step, number, chunk, chunks, queries)
        pairs = windowed_pairs(past, new, near + self.top_k)
        rows = Rows(shape.kv_heads * step.tokens)
        reads = (Access("keys", rows), Access("values", rows))
        return (
            append(step, ("keys", "values"), ("new_k", "new_v"), shape.kv_heads),
            *stages,
            attend(shape, step, Rows(pairs), reads, after=("append", "rank_3")),
        )

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """The stages that are due, then attention to sinks, window and chosen tokens."""
        shape, number = model.layers[layer], step.generated_tokens - 1
        near = self.sink_tokens + self.window_tokens
        refreshes = {1: self.refresh_1, 2: self.refresh_2, 3: self.refresh_3}
        stages: Plan = ()
        for stage, chunk, most in self._stages():
            if number % refreshes[stage] == 0:
                chunks = -(-min(step.tokens - near, most) // chunk)
                stages += self._stage(shape, step, stage, chunk, chunks, 1)
        drawn = tuple(count.name for count in self.counts(model, step, layer))
        read = Rows(shape.kv_heads * (near + self.top_k), tuple((name, self.chunk_3) for name in drawn))
        reads = (Access("keys", read, scattered=True), Access("values", read, scattered=True))
        after = ("append", *(op.name for op in stages[-1:]))
        sparse = attend(shape, step, Rows(near + self.top_k), reads, after=after)
        return (
            append(step, ("keys", "values"), ("new_k", "new_v"), shape.kv_heads),
            *stages,
            replace(sparse, draws=drawn),
        )

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`added`: chunks that a group's other query heads choose beside those of its first one."""
        shape, chosen = model.layers[layer], self.top_k // self.chunk_3
        left = (step.tokens - self.sink_tokens - self.window_tokens) // self.chunk_3 - chosen
        if step.prefilling or shape.group == 1 or not left:
            return ()
        most = min((shape.group - 1) * chosen, left)
        source = "assumption: the heads of a group share a third of their chunks; no published figure"
        return (Count(name="added", heads=shape.kv_heads, maximum=most, share=0.67, spread=0.1, source=source),)

    def _stages(self) -> tuple[tuple[int, int, int], ...]:
        """(number, tokens of a chunk, tokens searched at the most)."""
        return (1, self.chunk_1, BOUNDLESS), (2, self.chunk_2, self.tokens_2), (3, self.chunk_3, self.tokens_3)

    def _stage(self, shape: LayerShape, step: Step, number: int, chunk: int, chunks: int, queries: int) -> Plan:
        """Both halves of what is left of a chunk have one key scored, until one key is left; then chunks are ranked."""
        keys = shape.heads * chunks * 2 * ((chunk - 1).bit_length() + 1)
        score = Compute(
            name=f"stage_{number}",
            work=Work.MATMUL,
            rows=Rows(queries * keys),
            flops_per_row=2 * shape.head_dim,
            reads=(Access("q", Rows(step.new_tokens)), Access("keys", Rows(keys), scattered=True)),
            after=("append",),
        )
        rank = Compute(
            name=f"rank_{number}",
            work=Work.TOPK,
            rows=Rows(shape.heads * chunks),
            writes=(Access(f"ids_{number}", Rows(shape.heads)),),
            after=(score.name,),
        )
        return (score, rank)
