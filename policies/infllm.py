"""InfLLM: distant blocks live in DDR; a layer looks a few of them up by representative keys."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, kv_row, pair_flops, windowed_pairs
from policies.model import ModelShape
from policies.plan import Access, Buffer, Compute, Copy, Count, Plan, Rows, Step, Sync, Tier, Work
from policies.policy import Policy, Reuse, at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class InfLLM(Policy):
    """Sinks and a local window in HBM, `top_k` blocks of `block_tokens` fetched per layer from DDR.

    All heads of a layer share one selection. A block closes when it leaves the window; what has left the window and
    fills no block yet stays in HBM. Prefill runs in execution blocks of `execution_tokens` that look up as decode does.
    """

    name: ClassVar[str] = "infllm"
    paper: ClassVar[str] = "InfLLM, Xiao et al. 2024, arXiv:2402.04617"
    reuse: ClassVar[Reuse] = Reuse.PREFIX

    sink_tokens: int = 128
    window_tokens: int = 4096
    block_tokens: int = 128
    top_k: int = 16
    representative_tokens: int = 4
    cache_blocks: int = 32
    execution_tokens: int = 512

    def __post_init__(self) -> None:
        at_least(self, sink_tokens=0, window_tokens=1, block_tokens=1, top_k=1, execution_tokens=1)
        at_least(self, representative_tokens=1)
        if self.cache_blocks < self.top_k:
            raise ValueError(f"infllm: cache_blocks={self.cache_blocks} is below top_k={self.top_k}; one selection must fit")
        if self.representative_tokens > self.block_tokens:
            raise ValueError(
                f"infllm: representative_tokens={self.representative_tokens} exceeds block_tokens={self.block_tokens}"
            )

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """Until the first block closes the window covers everything."""
        return 1

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`local`: the window; `rest`: sinks and the tail that fills no block; `blocks`: one row per block in DDR."""
        shape, row = model.layers[layer], kv_row(model.layers[layer])
        blocks, rest, window = self._blocks(step.tokens), self._rest(step.tokens), self.window_tokens
        block_row = (self.block_tokens, *row)
        hbm = (
            Buffer("local", Tier.HBM, min(step.tokens, window + step.new_tokens - 1), row, model.kv_dtype),
            Buffer("rest", Tier.HBM, min(step.tokens, self.sink_tokens) + rest, row, model.kv_dtype),
            # Unrotated copies of window tokens wait for the block that they will close into.
            Buffer("waiting", Tier.HBM, min(step.tokens, window), row, model.kv_dtype),
        )
        if not blocks:
            return (*activations(model, step, layer), *hbm)
        cached = min(blocks, self.cache_blocks)
        return (
            *activations(model, step, layer),
            *hbm,
            Buffer("representatives", Tier.HBM, blocks, (shape.heads, shape.head_dim), model.dtype),
            Buffer("cached", Tier.HBM, cached, block_row, model.kv_dtype),
            Buffer("chosen", Tier.HBM, 1, (min(blocks, self.top_k),), "int64", ring=1),
            Buffer("chosen_host", Tier.DDR, 1, (min(blocks, self.top_k),), "int64", ring=1),
            Buffer("blocks", Tier.DDR, blocks, block_row, model.kv_dtype),
            Buffer("closing", Tier.HBM, blocks, block_row, model.kv_dtype, ring=1, view=True),
        )

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Execution blocks attend to the window and to looked-up blocks; blocks that close move to DDR."""
        pairs = windowed_pairs(step.past_tokens, step.new_tokens, self.window_tokens)
        return self._step(model, step, layer, pairs, -(-step.new_tokens // self.execution_tokens))

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Score the representatives, fetch the chosen blocks that are not cached, attend to near and far at once."""
        return self._step(model, step, layer, min(step.tokens, self.window_tokens), 1)

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`miss`: chosen blocks that are not in the HBM cache, one number per layer."""
        if not (blocks := self._blocks(step.tokens)):
            return ()
        lookups = -(-step.new_tokens // self.execution_tokens) if step.prefilling else 1
        source = "assumption: as ShadowKV's temporal locality (60 % hits); no published hit rate"
        return (
            Count(name="miss", heads=1, maximum=lookups * min(blocks, self.top_k), share=0.4, spread=0.1, source=source),
        )

    def _blocks(self, tokens: int) -> int:
        return max(0, tokens - self.window_tokens - self.sink_tokens) // self.block_tokens

    def _rest(self, tokens: int) -> int:
        return max(0, tokens - self.window_tokens - self.sink_tokens) % self.block_tokens

    def _step(self, model: ModelShape, step: Step, layer: int, pairs: int, lookups: int) -> Plan:
        shape, new = model.layers[layer], step.new_tokens
        blocks, window = self._blocks(step.tokens), min(step.tokens, self.window_tokens + new - 1)
        rest = max(0, min(step.tokens - self.window_tokens, self.sink_tokens)) + self._rest(step.tokens)
        near = (Access("local", Rows(window)), Access("rest", Rows(rest)))
        if not blocks:
            return (append(step, ("local", "waiting")), attend(shape, step, Rows(pairs + new * rest), near))
        chosen = min(blocks, self.top_k)
        ops = [
            append(step, ("local", "waiting")),
            Compute(
                name="score",
                work=Work.MATMUL,
                rows=Rows(lookups * blocks),
                flops_per_row=2 * shape.heads * shape.head_dim,
                reads=(Access("q", Rows(new)), Access("representatives", Rows(lookups * blocks))),
                after=("qkv",),
            ),
            Compute(
                name="select",
                work=Work.TOPK,
                rows=Rows(lookups * blocks),
                writes=(Access("chosen", Rows(lookups)),),
                after=("score",),
                draws=("miss",),
            ),
            Copy(name="ids_down", src="chosen", dst="chosen_host", rows=Rows(lookups), after=("select",)),
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
                rows=Rows(pairs + new * rest),
                flops_per_row=pair_flops(shape),
                reads=(Access("q", Rows(new)), *near),
                after=("append",),
            ),
            attend(
                shape,
                step,
                Rows(new * chosen * self.block_tokens),
                (Access("cached", Rows(lookups * chosen), scattered=True),),
                after=("attend_near", "fetch"),
            ),
        ]
        if closed := blocks - self._blocks(step.past_tokens):
            ops += [
                Compute(
                    name="represent",  # the tokens of a block that local attention weighed most, averaged
                    work=Work.ELEMENTWISE,
                    rows=Rows(closed * self.representative_tokens),
                    flops_per_row=shape.heads * shape.head_dim,
                    reads=(Access("closing", Rows(closed)),),
                    writes=(Access("representatives", Rows(closed)),),
                    after=("attend",),
                ),
                Copy(name="evict", src="closing", dst="blocks", rows=Rows(closed), after=("represent",)),
            ]
        return tuple(ops)
