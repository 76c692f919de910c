"""InfLLM: distant blocks live in DDR; a layer looks a few of them up by representative keys."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from policies.dense import activations, attend, causal_pairs, kv_row, pair_flops, windowed_pairs
from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Compute, Copy, Count, Plan, Rows, Step, Sync, Tier, Work
from policies.policy import Policy, Reuse, at_least, multiple_of


@dataclass(frozen=True, slots=True, kw_only=True)
class InfLLM(Policy):
    """Sinks and a local window in HBM, `top_k` blocks of `block_tokens` fetched per layer from DDR.

    All heads of a layer share one selection. A block closes when it leaves the window; what has left the window and
    fills no block yet stays in HBM. Prefill runs in execution blocks of `execution_tokens` that look up as decode does.
    """

    name: ClassVar[str] = "infllm"
    paper: ClassVar[str] = "InfLLM, Xiao et al. 2024, arXiv:2402.04617"
    reuse: ClassVar[Reuse] = Reuse.PREFIX
    by_shape: ClassVar[bool] = True

    sink_tokens: int = 128
    window_tokens: int = 4096
    block_tokens: int = 128
    top_k: int = 16
    representative_tokens: int = 4
    cache_blocks: int = 32
    execution_tokens: int = 512

    def __post_init__(self) -> None:
        at_least(self, sink_tokens=0, window_tokens=1, block_tokens=1, top_k=1, execution_tokens=1)
        at_least(self, representative_tokens=1, cache_blocks=1)
        multiple_of(self, "execution_tokens", "block_tokens")
        if self.cache_blocks < self.top_k:
            raise ValueError(
                f"infllm: cache_blocks={self.cache_blocks} is below top_k={self.top_k}, and one selection must fit; "
                f"use cache_blocks={self.top_k} or more"
            )
        if self.representative_tokens > self.block_tokens:
            raise ValueError(
                f"infllm: representative_tokens={self.representative_tokens} exceeds block_tokens={self.block_tokens}; "
                f"use {self.block_tokens} or fewer"
            )

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`local`: the window; `rest`: sinks and the tail that fills no block; `blocks`: one row per block in DDR.

        The authors' code keeps window tokens twice, as a key is rotated in the window and not outside; here a key is
        turned back when it leaves the window.
        """
        shape, row, tokens = model.layers[layer], kv_row(model.layers[layer]), step.tokens
        window = min(tokens, self.window_tokens)
        tail = min(max(0, tokens - self.window_tokens - self.sink_tokens), self.block_tokens)
        hbm = (
            Buffer("local", Tier.HBM, window, row, model.kv_dtype),
            Buffer("rest", Tier.HBM, min(tokens, self.sink_tokens) + tail, row, model.kv_dtype),
            # What local attention gave to each token of the window and the tail, for each query head.
            Buffer("mass", Tier.HBM, window + tail, (shape.heads,), "fp32"),
        )
        blocks, lookups = self.blocks(tokens), self._lookups(step)
        if not blocks:
            return (*activations(model, step, layer), *hbm)
        block_row, cached = (self.block_tokens, *row), min(blocks, self.cache_blocks)
        ids = (2, min(lookups.blocks, self.top_k))  # for each chosen block its id, if it is missed, and its slot
        closed = blocks - self.blocks(step.past_tokens)
        return (
            *activations(model, step, layer),
            *hbm,
            Buffer("representatives", Tier.HBM, blocks, (shape.heads, shape.head_dim), model.dtype),
            Buffer("cached", Tier.HBM, cached, block_row, model.kv_dtype),
            Buffer("resident", Tier.HBM, cached, (2,), "int64"),  # the block in each slot, and when it was last chosen
            Buffer("chosen", Tier.HBM, lookups.number, ids, "int64", ring=1),
            Buffer("chosen_host", Tier.DDR, lookups.number, ids, "int64", ring=1),
            Buffer("blocks", Tier.DDR, blocks, block_row, model.kv_dtype),
            Buffer("closing", Tier.HBM, closed, block_row, model.kv_dtype, view=True),
        )

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Execution blocks attend to the window and to looked-up blocks; blocks that close move to DDR."""
        return self.decode(model, step, layer)

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Score the representatives, fetch the chosen blocks that are not cached, attend to near and far at once."""
        near, closed = self._attend(model, step, layer), self.blocks(step.tokens) - self.blocks(step.past_tokens)
        ops = (*near, self._weigh(model.layers[layer], step), self._append(step, closed))
        if not closed:
            return ops
        shape = model.layers[layer]
        represent = Compute(
            name="represent",  # the tokens of a block that local attention weighed most, averaged
            work=Work.ELEMENTWISE,
            rows=Rows(closed * self.representative_tokens),
            flops_per_row=shape.heads * shape.head_dim,
            reads=(Access("closing", Rows(closed)),),
            writes=(Access("representatives", Rows(closed)),),
            after=("append",),
        )
        return (
            *ops,
            represent,
            Copy(name="evict", src="closing", dst="blocks", rows=Rows(closed), after=("append",)),
        )

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`miss`: chosen blocks that are not in the HBM cache, one number per layer."""
        lookups = self._lookups(step)
        if not lookups.blocks:
            return ()
        source = "assumption: as ShadowKV's temporal locality (60 % hits); no published hit rate"
        return (Count(name="miss", heads=1, maximum=lookups.chosen, share=0.4, spread=0.1, source=source),)

    def blocks(self, tokens: int) -> int:
        """Blocks that have closed once a sequence holds `tokens`."""
        return max(0, tokens - self.window_tokens - self.sink_tokens) // self.block_tokens

    def _window(self, step: Step) -> int:
        return min(step.tokens, self.window_tokens + step.new_tokens - 1)

    def _lookups(self, step: Step) -> "_Lookups":
        past, new, unit = step.past_tokens, step.new_tokens, self.execution_tokens
        rounds = -(-new // unit)
        if rounds == 1:
            blocks = self.blocks(past)
            chosen = min(blocks, self.top_k)
            return _Lookups(1, blocks, blocks, chosen, new * blocks, new * chosen)
        last = self.blocks(past + (rounds - 1) * unit)
        if not last:
            return _Lookups(0, 0, 0, 0, 0, 0)
        # Blocks grow evenly from the first round that finds any, by `growth` a round.
        closed_at, growth = self.window_tokens + self.sink_tokens + self.block_tokens, unit // self.block_tokens
        idle = max(0, -((past - closed_at) // unit))
        first, number = self.blocks(past + idle * unit), rounds - idle
        scored = number * first + growth * (number * (number - 1) // 2)
        few = min(number, max(0, -((first - self.top_k) // growth)))  # rounds that find fewer than `top_k`
        chosen = few * first + growth * (few * (few - 1) // 2) + (number - few) * self.top_k
        absent = rounds * unit - new  # queries that the last round lacks
        return _Lookups(
            number, last, scored, chosen, unit * scored - absent * last, unit * chosen - absent * min(last, self.top_k)
        )

    def _earlier(self, step: Step) -> Access:
        """The tokens of the window that were there before the step."""
        return Access("local", Rows(self._window(step) - step.new_tokens))

    def _weigh(self, shape: LayerShape, step: Step) -> Compute:
        """Add to each token's mass: its local scores once more, now that the softmax over both parts is known."""
        return Compute(
            name="weigh",
            work=Work.MATMUL,
            rows=Rows(windowed_pairs(step.past_tokens, step.new_tokens, self.window_tokens)),
            flops_per_row=2 * shape.heads * shape.head_dim,
            reads=(Access("q", Rows(step.new_tokens)), self._earlier(step), Access("new_kv", Rows(step.new_tokens))),
            writes=(Access("mass", self._earlier(step).rows),),
            after=("attend",),
        )

    def _append(self, step: Step, closed: int) -> Compute:
        """New tokens enter the window; those that leave it become sinks, the tail, or blocks that close."""
        (sinks, tail), (sinks_before, tail_before) = self._outside(step.tokens), self._outside(step.past_tokens)
        left = max(0, step.tokens - self.window_tokens) - max(0, step.past_tokens - self.window_tokens)
        kept = Rows(min(step.new_tokens, self.window_tokens))
        stays = Rows(sinks - sinks_before + tail - (0 if closed else tail_before))
        return Compute(
            name="append",
            work=Work.ELEMENTWISE,
            reads=(
                Access("new_kv", Rows(step.new_tokens)),
                Access("local", Rows(min(left, step.past_tokens, self.window_tokens))),
                Access("rest", Rows(tail_before if closed else 0)),
            ),
            writes=(
                Access("local", kept),
                Access("rest", stays),
                Access("mass", Rows(kept.fixed + tail - (0 if closed else tail_before))),
                *((Access("closing", Rows(closed)),) if closed else ()),
            ),
            after=("weigh",),
        )

    def _outside(self, tokens: int) -> tuple[int, int]:
        """Sinks that have left the window, and tokens that have left it and fill no block yet."""
        gone = max(0, tokens - self.window_tokens)
        return min(gone, self.sink_tokens), max(0, gone - self.sink_tokens) - self.block_tokens * self.blocks(tokens)

    def _attend(self, model: ModelShape, step: Step, layer: int) -> Plan:
        shape, new, lookups = model.layers[layer], step.new_tokens, self._lookups(step)
        # Every earlier token that is in no block is near: sinks, window and the tail between them.
        pairs = Rows(causal_pairs(step.past_tokens, new) - self.block_tokens * lookups.scored_pairs)
        rest = step.tokens - self._window(step) - self.block_tokens * self.blocks(step.past_tokens)
        near = (self._earlier(step), Access("new_kv", Rows(new)), Access("rest", Rows(rest)))
        if not lookups.blocks:
            return (attend(shape, step, pairs, near, after=("qkv",)),)
        scored = Rows(lookups.scored)
        return (
            Compute(
                name="score",
                work=Work.MATMUL,
                rows=scored,
                flops_per_row=2 * shape.heads * shape.head_dim,
                reads=(Access("q", Rows(new)), Access("representatives", scored)),
                after=("qkv",),
            ),
            Compute(
                name="select",
                work=Work.TOPK,
                rows=scored,
                writes=(Access("chosen", Rows(lookups.number)),),
                after=("score",),
                draws=("miss",),
            ),
            Copy(name="ids_down", src="chosen", dst="chosen_host", rows=Rows(lookups.number), after=("select",)),
            Sync(name="wait_ids", after=("ids_down",)),
            Copy(
                name="fetch",
                src="blocks",
                dst="cached",
                rows=Rows(0, (("miss", 1),)),
                ids=("chosen_host",),
                after=("wait_ids",),
            ),
            Compute(
                name="attend_near",
                work=Work.ATTENTION,
                rows=pairs,
                flops_per_row=pair_flops(shape, step),
                reads=(Access("q", Rows(new)), *near),
                after=("qkv",),
            ),
            attend(
                shape,
                step,
                Rows(self.block_tokens * lookups.chosen_pairs),
                (Access("cached", Rows(lookups.chosen), scattered=True),),
                after=("attend_near", "fetch"),
            ),
        )


class _Lookups(NamedTuple):
    """Sums over a step's execution blocks; each sees the blocks that were closed when it began."""

    number: int  # execution blocks that find any
    blocks: int  # what the last one finds
    scored: int
    chosen: int
    scored_pairs: int  # of a query and a block
    chosen_pairs: int
