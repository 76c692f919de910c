"""Landmark Attention: a trained token stands for each block, and blocks whose token attracts a query come from DDR."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, kv_row, pair_flops
from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Compute, Copy, Count, Plan, Rows, Step, Sync, Tier, Work
from policies.policy import Policy, Reuse, at_least, multiple_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Landmark(Policy):
    """Every `block_tokens` tokens a landmark token closes a block; a query head reads the `top_k` blocks whose landmark
    it scores highest, and what is local: the open block in decode, the window of `window_tokens` in a prompt.

    Landmark keys stay in HBM, closed blocks move to DDR. The model's own work on landmark tokens, 1 in `block_tokens`,
    is not counted. The blocks of the first `sink_tokens` are among the `top_k` (0: the paper's own form). Within a
    block attention is a softmax of its own, so the result is not that of dense attention.
    """

    name: ClassVar[str] = "landmark"
    paper: ClassVar[str] = "Landmark Attention, Mohtashami and Jaggi 2023, arXiv:2305.16300"
    trained: ClassVar[str] = "a model fine-tuned with landmark tokens"
    reuse: ClassVar[Reuse] = Reuse.PREFIX
    by_shape: ClassVar[bool] = True

    block_tokens: int = 50
    top_k: int = 5
    window_tokens: int = 250
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        at_least(self, block_tokens=1, window_tokens=1, sink_tokens=0)
        at_least(self, top_k=max(1, -(-self.sink_tokens // self.block_tokens)))
        multiple_of(self, "window_tokens", "block_tokens")

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """A prompt within one window looks nothing up."""
        return self.window_tokens + 1

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`local`: one row per token; `landmarks`: a key per closed block and head; `blocks`: a block with its landmark
        per closed block and head.
        """
        shape, heads, blocks = model.layers[layer], model.layers[layer].kv_heads, step.tokens // self.block_tokens
        local = min(step.tokens, self.window_tokens) if step.prefilling else self._open(step)
        row, found = self._block_row(shape), heads * min(shape.group * self.top_k, self._searched(step))
        closed = heads * (blocks - step.past_tokens // self.block_tokens)
        return (
            *activations(model, step, layer),
            Buffer("local", Tier.HBM, local, kv_row(shape), model.kv_dtype),
            Buffer("landmarks", Tier.HBM, heads * blocks, (shape.head_dim,), model.dtype),
            Buffer("blocks", Tier.DDR, heads * blocks, row, model.kv_dtype),
            Buffer("closing", Tier.HBM, closed, row, model.kv_dtype, view=True),
            Buffer("found_blocks", Tier.HBM, found, row, model.kv_dtype, ring=1),
            Buffer("ids", Tier.HBM, shape.heads, (self.top_k,), "int64", ring=1),
            Buffer("ids_host", Tier.DDR, shape.heads, (self.top_k,), "int64", ring=1),
        )

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Window after window: look blocks up, attend to them and to the window; complete blocks move to DDR."""
        begin, end = self._prompt_sums(step.past_tokens), self._prompt_sums(step.tokens)
        local, scored, far = (there - here for here, there in zip(begin, end, strict=True))
        window = min(step.tokens, self.window_tokens + step.new_tokens - 1)
        return self._attend(model, step, layer, scored, (local, far, window))

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Score the landmarks, fetch the chosen blocks, attend to them and to the open block."""
        blocks, near = self._searched(step), self._open(step)
        chosen = min(self.top_k, blocks)
        return self._attend(model, step, layer, blocks, (near, chosen * (self.block_tokens + 1), near))

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`fetched`: blocks that any head of a group chooses, summed over a prompt's windows."""
        group, least = model.layers[layer].group, self._fetched(step, self.top_k)
        if not least:
            return ()
        most = self._fetched(step, self.top_k * group)
        source = "each head's own" if group == 1 else "assumption: a head shares a third of its blocks with its group"
        share = (1 + 0.67 * (group - 1)) / group
        spread = 0.0 if group == 1 else 0.1
        heads = model.layers[layer].kv_heads
        return (
            Count(name="fetched", heads=heads, minimum=least, maximum=most, share=share, spread=spread, source=source),
        )

    def _attend(self, model: ModelShape, step: Step, layer: int, scored: int, seen: tuple[int, int, int]) -> Plan:
        """`scored` landmarks, summed over queries; `seen` are local pairs, pairs in chosen blocks, and local rows."""
        shape, heads, new = model.layers[layer], model.layers[layer].kv_heads, Rows(step.new_tokens)
        local_pairs, far_pairs, local_rows = seen
        near = (Access("local", Rows(local_rows)),)
        store, close = append(step, ("local",)), self._close(shape, step)
        if not scored:
            return (store, attend(shape, step, Rows(local_pairs), near), *close)
        fetched = Rows(0, (("fetched", 1),))
        score = Compute(
            name="score",
            work=Work.MATMUL,
            rows=Rows(scored),
            flops_per_row=2 * shape.heads * shape.head_dim,
            reads=(Access("q", new), Access("landmarks", Rows(heads * self._searched(step)))),
            after=("qkv",),
        )
        select = Compute(
            name="select",
            work=Work.TOPK,
            rows=Rows(shape.heads * scored),
            writes=(Access("ids", Rows(shape.heads)),),
            after=("score",),
            draws=("fetched",),
        )
        down = Copy(name="ids_down", src="ids", dst="ids_host", rows=Rows(shape.heads), after=("select",))
        fetch = Copy(
            name="fetch", src="blocks", dst="found_blocks", rows=fetched, ids=("ids_host",), after=("wait_ids",)
        )
        wait = Sync(name="wait_ids", after=("ids_down",))
        attend_near = Compute(
            name="attend_near",
            work=Work.ATTENTION,
            rows=Rows(local_pairs),
            flops_per_row=pair_flops(shape, step),
            reads=(Access("q", new), *near),
            after=("append",),
        )
        grouped = attend(
            shape, step, Rows(far_pairs), (Access("found_blocks", fetched),), after=("attend_near", "fetch")
        )
        return (store, score, select, down, wait, fetch, attend_near, grouped, *close)

    def _close(self, shape: LayerShape, step: Step) -> Plan:
        closed = step.tokens // self.block_tokens - step.past_tokens // self.block_tokens
        if not closed:
            return ()
        rows = Rows(shape.kv_heads * closed)
        keep = Compute(
            name="keep_landmarks",
            work=Work.ELEMENTWISE,
            reads=(Access("closing", rows),),
            writes=(Access("landmarks", rows),),
            after=("attend",),
        )
        return (keep, Copy(name="close", src="closing", dst="blocks", rows=rows, after=("keep_landmarks",)))

    def _block_row(self, shape: LayerShape) -> tuple[int, ...]:
        tokens = self.block_tokens + 1
        if shape.head_dim == shape.v_head_dim:
            return (tokens, 2, shape.head_dim)
        return (tokens, shape.head_dim + shape.v_head_dim)

    def _searched(self, step: Step) -> int:
        """Closed blocks that the step's last query may look up."""
        if not step.prefilling:
            return step.past_tokens // self.block_tokens
        return (step.tokens - 1) // self.window_tokens * (self.window_tokens // self.block_tokens)

    def _open(self, step: Step) -> int:
        """Tokens of the block that a decode step adds to."""
        return step.tokens - step.past_tokens // self.block_tokens * self.block_tokens

    def _fetched(self, step: Step, top_k: int) -> int:
        """Blocks that the step's windows look up when each takes `top_k`, or all there are."""
        if not step.prefilling:
            return min(top_k, self._searched(step))
        first, last = step.past_tokens // self.window_tokens, -(-step.tokens // self.window_tokens)
        return self._chosen_before(last, top_k) - self._chosen_before(first, top_k)

    def _chosen_before(self, windows: int, top_k: int) -> int:
        per = self.window_tokens // self.block_tokens
        few = min(windows, -(-top_k // per))  # windows that find fewer
        return per * (few * (few - 1) // 2) + (windows - few) * top_k

    def _prompt_sums(self, tokens: int) -> tuple[int, int, int]:
        """(local pairs, landmarks scored, pairs in chosen blocks) of a prompt's first `tokens` tokens."""
        window, per = self.window_tokens, self.window_tokens // self.block_tokens
        windows, rest = tokens // window, tokens % window
        local = windows * (window * (window + 1) // 2) + rest * (rest + 1) // 2
        scored = window * per * (windows * (windows - 1) // 2) + rest * per * windows
        chosen = window * self._chosen_before(windows, self.top_k) + rest * min(self.top_k, per * windows)
        return local, scored, chosen * (self.block_tokens + 1)
