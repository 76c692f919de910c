"""XAttention: sums along antidiagonals say which blocks of a prompt's attention are worth computing."""

from dataclasses import dataclass, replace
from typing import ClassVar

from policies.dense import activations, append, attend, causal_pairs, held_pairs, kv_row, pair_flops
from policies.model import ModelShape
from policies.plan import Access, Buffer, Compute, Count, Plan, Rows, Step, Tier, Work
from policies.policy import Policy, Reuse, at_least, multiple_of, share_of


@dataclass(frozen=True, slots=True, kw_only=True)
class XAttention(Policy):
    """Each query head and block of queries computes the blocks of keys that hold `threshold` of its attention.

    The mass of a block is estimated from every `stride_tokens`-th antidiagonal. The first block, with the sinks,
    and the diagonal are always computed. Storage and decode are those of a dense cache. `threshold=1` computes
    everything; below it, how many blocks reach it is the data's: `kept`.
    """

    name: ClassVar[str] = "xattention"
    paper: ClassVar[str] = "XAttention, Xu et al. 2025, arXiv:2503.16428"
    reuse: ClassVar[Reuse] = Reuse.BLOCKS
    verifies: ClassVar[bool] = True
    by_shape: ClassVar[bool] = True

    block_tokens: int = 128
    stride_tokens: int = 16
    threshold: float = 0.9

    def __post_init__(self) -> None:
        at_least(self, block_tokens=1, stride_tokens=1)
        multiple_of(self, "block_tokens", "stride_tokens")
        share_of(self, "threshold")

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """Two blocks are the first and the diagonal one."""
        return 2 * self.block_tokens + 1

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`kv`: one row per token; `masses`: the estimate of each pair of blocks, for each query head."""
        kv = Buffer("kv", Tier.HBM, step.tokens, kv_row(model.layers[layer]), model.kv_dtype)
        if not step.prefilling or self.threshold >= 1:
            return (*activations(model, step, layer), kv)
        queries, keys = self._query_blocks(step), -(-step.tokens // self.block_tokens)
        masses = Buffer("masses", Tier.HBM, model.layers[layer].heads, (queries, keys), "fp32", ring=1)
        return (*activations(model, step, layer), kv, masses)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Score every `stride_tokens` x `stride_tokens` square, sum to blocks, choose, attend to the chosen blocks."""
        shape, new, stride = model.layers[layer], step.new_tokens, self.stride_tokens
        cache = (Access("kv", Rows(step.tokens)),)  # read again for each block of queries, but from the L2 cache
        if self.threshold >= 1:
            return (append(step), attend(shape, step, Rows(causal_pairs(step.past_tokens, new)), cache))
        first = step.past_tokens // stride
        squares = causal_pairs(first, -(-step.tokens // stride) - first)
        masses = Rows(shape.heads)
        sparse = attend(
            shape,
            step,
            Rows(shape.heads * self._forced(step), (("kept", self.block_tokens**2),)),
            cache,
            after=("append", "select"),
        )
        return (
            append(step),
            Compute(
                name="score",
                work=Work.MATMUL,
                rows=Rows(squares),
                flops_per_row=2 * shape.heads * stride * shape.head_dim,
                reads=(Access("q", Rows(new)), *cache),
                after=("append",),
            ),
            Compute(
                name="sum_blocks",  # softmax over the squares of a row, then sums
                work=Work.ELEMENTWISE,
                rows=Rows(shape.heads * squares),
                flops_per_row=5,
                writes=(Access("masses", masses),),
                after=("score",),
            ),
            Compute(
                name="select",
                work=Work.TOPK,
                rows=Rows(shape.heads * self._candidates(step)),
                reads=(Access("masses", masses),),
                after=("sum_blocks",),
                draws=("kept",),
            ),
            replace(sparse, flops_per_row=pair_flops(shape, step) // shape.heads),  # each query head has its own blocks
        )

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense."""
        cache = (Access("kv", Rows(step.tokens)),)
        return (append(step), attend(model.layers[layer], step, Rows(held_pairs(step, step.tokens)), cache))

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`kept`: blocks computed beside the forced ones, per query head."""
        if not step.prefilling or self.threshold >= 1:
            return ()
        source = "assumption: a fifth of the blocks; the density is said to fall from a half at 4K to 7 % at 128K"
        heads, most = model.layers[layer].heads, self._candidates(step)
        return (Count(name="kept", heads=heads, maximum=most, share=0.2, spread=0.1, source=source),)

    def _query_blocks(self, step: Step) -> int:
        return -(-step.tokens // self.block_tokens) - step.past_tokens // self.block_tokens

    def _forced(self, step: Step) -> int:
        """Query-key pairs in the first block of keys and on the diagonal, per query head."""
        return self._forced_before(step.tokens) - self._forced_before(step.past_tokens)

    def _forced_before(self, tokens: int) -> int:
        block = self.block_tokens
        rest = tokens % block
        diagonal = tokens // block * (block * (block + 1) // 2) + rest * (rest + 1) // 2
        return diagonal + max(0, tokens - block) * block

    def _candidates(self, step: Step) -> int:
        """Whole blocks of pairs that may be left out, per query head."""
        pairs = causal_pairs(step.past_tokens, step.new_tokens) - self._forced(step)
        return pairs // self.block_tokens**2
