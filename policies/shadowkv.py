"""ShadowKV: low-rank keys and chunk landmarks in HBM, values in DDR."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, raw_buffers, raw_prefill
from policies.model import ModelShape
from policies.plan import Access, Buffer, Compute, Copy, Count, Engine, Plan, Rows, Step, Tier, Work, pieces_of
from policies.policy import Policy, Reuse, at_least, multiple_of

LOCAL_CHUNKS = 4  # the prompt's tail that stays exact, at the least
CHUNK_ALIGNMENT = 8  # the authors round the number of chunks down to a multiple of this
OUTLIERS_PER_KI_TOKENS = 24  # the authors' outlier chunks for each 1,024 tokens of budget


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowKV(Policy):
    """Keys are kept as a rank-`rank` product and rebuilt; missed values are gathered from pinned host memory.

    Each KV head attends to `budget_tokens` of chunks chosen by landmark (a chunk's mean key), to `outlier_chunks`
    whose keys their landmark describes worst, to the prompt's tail and to all generated tokens. Chunks chosen at the
    step before are still in HBM. `outlier_chunks`, when not given, is in proportion to the budget as the authors' 24
    for 1,024 tokens, rounded up (their code rounds down, to none below 1,024). The chunks of the first `sink_tokens`
    are exact as well (0: the paper's own form).
    """

    name: ClassVar[str] = "shadowkv"
    paper: ClassVar[str] = "ShadowKV, Sun et al. 2024, arXiv:2410.21465"
    reuse: ClassVar[Reuse] = Reuse.PREFIX
    by_shape: ClassVar[bool] = True

    budget_tokens: int = 2048
    chunk_tokens: int = 8
    rank: int = 160
    outlier_chunks: int | None = None
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        at_least(self, budget_tokens=1, chunk_tokens=1, rank=1, sink_tokens=0)
        multiple_of(self, "budget_tokens", "chunk_tokens")
        if self.outlier_chunks is not None:
            at_least(self, outlier_chunks=0)

    @property
    def exact_chunks(self) -> int:
        """Chunks per KV head that stay exact in HBM: those that the sinks can lie on, and outliers."""
        outliers = self.outlier_chunks
        if outliers is None:
            outliers = -(-self.budget_tokens * OUTLIERS_PER_KI_TOKENS // 1024)
        return pieces_of(self.sink_tokens, self.chunk_tokens) + outliers

    @property
    def budget_chunks(self) -> int:
        """Chunks per KV head that a step selects."""
        return self.budget_tokens // self.chunk_tokens

    def chunks(self, prompt_tokens: int) -> int:
        """Chunks of a prompt that are indexed; what follows them is local."""
        return max(0, prompt_tokens // self.chunk_tokens - LOCAL_CHUNKS) // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """There must be more chunks than are selected or exact anyway, and as many tokens as the rank."""
        least = self.budget_chunks + self.exact_chunks + 1
        aligned = -(-least // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
        return max((aligned + LOCAL_CHUNKS) * self.chunk_tokens, self.rank_of(model, layer))

    def rank_of(self, model: ModelShape, layer: int) -> int:
        """The rank in use: a decomposition cannot exceed the width of the concatenated keys."""
        return min(self.rank, model.layers[layer].kv_heads * model.layers[layer].head_dim)

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """Raw keys and values until the prompt is complete; then low-rank keys, landmarks, exact rows, slots, values.

        `*_exact` hold exact chunks, local and generated tokens, one row per token and head; `*_slots` and `values_host`
        one row per chunk and head; `chunk_ids` the exact chunks first, then the chunk of each landmark.
        """
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        views = activations(model, step, layer)
        if step.prefilling and not step.last_chunk:
            return (*views, *raw_buffers(model, step, layer))
        prompt, rank, chunks = step.prompt_tokens, self.rank_of(model, layer), self.chunks(step.prompt_tokens)
        exact = heads * self._exact_tokens(step)
        slots = heads * self.budget_chunks
        k_row, v_row = (self.chunk_tokens, shape.head_dim), (self.chunk_tokens, shape.v_head_dim)
        state = (
            Buffer("u", Tier.HBM, prompt, (rank,), model.dtype),
            Buffer("sv", Tier.HBM, heads, (rank, shape.head_dim), model.dtype),
            Buffer("landmarks", Tier.HBM, heads * (chunks - self.exact_chunks), (shape.head_dim,), model.dtype),
            Buffer("chunk_ids", Tier.HBM, heads, (chunks,), "int64"),
            Buffer("k_exact", Tier.HBM, exact, (shape.head_dim,), model.kv_dtype),
            Buffer("v_exact", Tier.HBM, exact, (shape.v_head_dim,), model.kv_dtype),
            Buffer("k_slots", Tier.HBM, slots, k_row, model.kv_dtype),
            Buffer("v_slots", Tier.HBM, slots, v_row, model.kv_dtype),
            Buffer("slot_ids", Tier.HBM, heads, (self.budget_chunks,), "int64"),
            Buffer("values_host", Tier.DDR, heads * chunks, v_row, model.kv_dtype),
            Buffer("scores", Tier.HBM, shape.heads, (chunks - self.exact_chunks,), "fp32", ring=1),
            Buffer("head_scores", Tier.HBM, heads, (chunks - self.exact_chunks,), "fp32", ring=1),
        )
        if not step.last_chunk:
            return (*views, *state)
        raw = raw_buffers(model, step, layer)
        # The values once more, a chunk to a row.
        raw_chunks = Buffer("raw_value_chunks", Tier.HBM, heads * chunks, v_row, model.kv_dtype, raw[0].ring, view=True)
        return (*views, *raw, raw_chunks, *state)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense; at the end decompose the keys, build landmarks, set outliers aside, offload the values."""
        ops = raw_prefill(model, step, layer, ("offload_values",))
        if not step.last_chunk:
            return ops
        shape, heads, prompt = model.layers[layer], model.layers[layer].kv_heads, step.prompt_tokens
        chunks = self.chunks(prompt)
        landmarks, exact = Rows(heads * (chunks - self.exact_chunks)), Rows(heads * self._exact_tokens(step))
        raw = Rows(heads * prompt)
        slots, slot_tokens = Rows(heads * self.budget_chunks), Rows(heads * self.budget_tokens)
        return (
            *ops,
            Compute(
                name="decompose",  # n x m matrix of all heads' unrotated keys: leading order of a full SVD
                work=Work.FACTOR,
                rows=Rows(prompt),
                flops_per_row=4 * (heads * shape.head_dim) ** 2,
                reads=(Access("raw_keys", raw),),
                writes=(Access("u", Rows(prompt)), Access("sv", Rows(heads))),
                after=("attend",),
            ),
            Compute(
                name="landmark",  # chunk means and the least cosine of a chunk's keys to its mean
                work=Work.ELEMENTWISE,
                rows=raw,
                flops_per_row=5 * shape.head_dim,
                reads=(Access("raw_keys", raw),),
                after=("attend",),
            ),
            Compute(
                name="outliers",  # the others keep their landmark
                work=Work.TOPK,
                rows=Rows(heads * chunks),
                writes=(Access("chunk_ids", Rows(heads)), Access("landmarks", landmarks)),
                after=("landmark",),
            ),
            Compute(
                name="fill",  # the slots get what the last query of the prompt would choose
                work=Work.ELEMENTWISE,
                reads=(
                    Access("raw_keys", exact, scattered=True),
                    Access("raw_values", exact, scattered=True),
                    Access("raw_keys", slot_tokens, scattered=True),
                    Access("raw_values", slot_tokens, scattered=True),
                ),
                writes=(
                    Access("k_exact", exact),
                    Access("v_exact", exact),
                    Access("k_slots", slots),
                    Access("v_slots", slots),
                    Access("slot_ids", Rows(heads)),
                ),
                after=("outliers",),
            ),
            Copy(
                name="offload_values",
                src="raw_value_chunks",
                dst="values_host",
                rows=Rows(heads * chunks),
                after=("append",),
            ),
        )

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Score landmarks, pick chunks per KV head, fetch missed values while missed keys are rebuilt, attend."""
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        rank, indexed = self.rank_of(model, layer), self.chunks(step.prompt_tokens) - self.exact_chunks
        exact, slots = Rows(heads * self._exact_tokens(step)), Rows(heads * self.budget_chunks)
        missed, missed_tokens = Rows(0, (("miss", 1),)), Rows(0, (("miss", self.chunk_tokens),))
        return (
            append(step, ("k_exact", "v_exact"), ("new_k", "new_v"), heads),
            Compute(
                name="score",
                work=Work.MATMUL,
                rows=Rows(indexed),
                flops_per_row=2 * shape.heads * shape.head_dim,
                reads=(Access("q", Rows(1)), Access("landmarks", Rows(heads * indexed))),
                writes=(Access("scores", Rows(shape.heads)),),
                after=("qkv",),
            ),
            Compute(
                name="aggregate",  # softmax over the chunks, then the largest of a group's query heads
                work=Work.ELEMENTWISE,
                rows=Rows(shape.heads * indexed),
                flops_per_row=4,
                reads=(Access("scores", Rows(2 * shape.heads)),),
                writes=(Access("head_scores", Rows(heads)),),
                after=("score",),
            ),
            Compute(
                name="select",
                work=Work.TOPK,
                rows=Rows(heads * indexed),
                reads=(
                    Access("head_scores", Rows(heads)),
                    Access("chunk_ids", Rows(heads)),
                    Access("slot_ids", Rows(heads)),
                ),
                writes=(Access("slot_ids", Rows(heads)),),
                after=("aggregate",),
                draws=("miss",),
            ),
            Copy(
                name="fetch",
                src="values_host",
                dst="v_slots",
                rows=missed,
                engine=Engine.GATHER,
                ids=("slot_ids",),
                after=("select",),
            ),
            Compute(
                name="rebuild",  # rows of U times SV, rotated to their positions
                work=Work.MATMUL,
                rows=missed_tokens,
                flops_per_row=2 * rank * shape.head_dim + 3 * shape.head_dim,
                reads=(Access("u", missed_tokens, scattered=True), Access("sv", Rows(heads))),
                writes=(Access("k_slots", missed),),
                after=("select",),
            ),
            attend(
                shape,
                step,
                Rows(self._exact_tokens(step) + self.budget_tokens),
                (
                    Access("k_exact", exact),
                    Access("v_exact", exact),
                    Access("k_slots", slots),
                    Access("v_slots", slots),
                ),
                after=("append", "fetch", "rebuild"),
            ),
        )

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`miss`: selected chunks that the step before had not selected."""
        if step.prefilling:
            return ()
        heads, source = model.layers[layer].kv_heads, "ShadowKV section 4: 60 % of the chunks are chosen again"
        return (Count(name="miss", heads=heads, maximum=self.budget_chunks, share=0.4, spread=0.1, source=source),)

    def _exact_tokens(self, step: Step) -> int:
        local = step.prompt_tokens - self.chunks(step.prompt_tokens) * self.chunk_tokens
        return self.exact_chunks * self.chunk_tokens + local + step.generated_tokens
