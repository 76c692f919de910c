"""LazyLLM: deeper layers compute fewer of a prompt's tokens, and catch up when one is needed after all."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, causal_pairs
from policies.model import ModelShape
from policies.plan import Access, Buffer, Compute, Count, Plan, Rows, Step, Tier, Work, part_of
from policies.policy import Policy, at_least, share_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyLLM(Policy):
    """The four quarters of the layers compute all, `keep_2`, `keep_3` and `keep_4` of the prompt's tokens.

    The last token's attention ranks them where a quarter ends, the first `sink_tokens` before all others (0: the
    paper's own form). A token that drops out leaves its hidden state there
    and is computed at a deeper layer when a decode step wants it: `revive`. Every layer has room for all tokens.

    The defaults compute 64 % of the prompt's tokens, the share that is reported for multi-document questions; where
    the layers are and what they keep was tuned per task and is not published. Only attention shrinks here: the drivers
    run the model's own projections and MLP over every token, so the time to the first token is an upper bound.
    """

    name: ClassVar[str] = "lazyllm"
    paper: ClassVar[str] = "LazyLLM, Fu et al. 2024, arXiv:2407.14057"

    keep_2: float = 0.75
    keep_3: float = 0.5
    keep_4: float = 0.3
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        at_least(self, sink_tokens=0)
        share_of(self, "keep_2", "keep_3", "keep_4")
        if not self.keep_2 >= self.keep_3 >= self.keep_4:
            raise ValueError(
                f"lazyllm: keep_2={self.keep_2}, keep_3={self.keep_3}, keep_4={self.keep_4} must not grow with depth: "
                "a token that a layer lacks reaches no layer behind it"
            )

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """As many tokens as leave one beside the sinks at the deepest layers."""
        return int((1 + self.sink_tokens) / self.keep_4) + 1

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`keys`, `values`: a row per token and head; `hidden`: the states of tokens that this layer is first to lack.

        `revived` are the states, kept at shallower layers, of tokens that a step wants.
        """
        shape, tokens = model.layers[layer], step.tokens
        rows = shape.kv_heads * tokens
        state: tuple[Buffer, ...] = (
            Buffer("keys", Tier.HBM, rows, (shape.head_dim,), model.kv_dtype),
            Buffer("values", Tier.HBM, rows, (shape.v_head_dim,), model.kv_dtype),
        )
        lost = self._lost_here(model, step, layer)
        if lost:
            state += (Buffer("hidden", Tier.HBM, lost, (model.hidden_dim,), model.dtype),)
        if not step.prefilling and self._share(model, layer) < 1:
            state += (
                Buffer("revived", Tier.HBM, step.past_tokens, (model.hidden_dim,), model.dtype, ring=1, view=True),
            )
        return (*activations(model, step, layer), *state)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Attention of the tokens that have come this far; a quarter's first layer sets the others aside."""
        shape, share = model.layers[layer], self._share(model, layer)
        before, after = part_of(step.past_tokens, share), part_of(step.tokens, share)
        new = after - before
        held = Rows(shape.kv_heads * after)
        store = Compute(
            name="append",
            work=Work.ELEMENTWISE,
            reads=(Access("new_k", Rows(new)), Access("new_v", Rows(new))),
            writes=(Access("keys", Rows(shape.kv_heads * new)), Access("values", Rows(shape.kv_heads * new))),
            after=("qkv",),
        )
        reads = (Access("keys", held), Access("values", held))
        ops: Plan = (store, attend(shape, step, Rows(causal_pairs(before, new)), reads))
        lost = self._lost_here(model, step, layer)
        if lost and step.last_chunk:
            kept_before = part_of(step.tokens, self._share(model, layer - 1))
            rank = Compute(name="rank", work=Work.TOPK, rows=Rows(kept_before), after=("attend",))
            leave = Compute(
                name="leave", work=Work.ELEMENTWISE, writes=(Access("hidden", Rows(lost)),), after=("rank",)
            )
            ops = (*ops, rank, leave)
        return ops

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Compute the wanted tokens that this layer lacks, then attend to as many tokens as a prompt would keep."""
        shape, share = model.layers[layer], self._share(model, layer)
        chosen = part_of(step.past_tokens, share) + 1
        rows, sparse = Rows(shape.kv_heads * chosen), share < 1
        reads = (Access("keys", rows, scattered=sparse), Access("values", rows, scattered=sparse))
        new = append(step, ("keys", "values"), ("new_k", "new_v"), shape.kv_heads)
        if not sparse:
            return (new, attend(shape, step, Rows(chosen), reads))
        wanted, wanted_rows = Rows(0, (("revive", 1),)), Rows(0, (("revive", shape.kv_heads),))
        rank = Compute(name="rank", work=Work.TOPK, rows=Rows(step.past_tokens), after=("qkv",), draws=("revive",))
        revive = Compute(
            name="revive",  # the whole layer, for these tokens
            work=Work.MATMUL,
            rows=wanted,
            flops_per_row=2 * (shape.qkv_params + shape.out_params + shape.mlp_active_params),
            reads=(Access("revived", wanted, scattered=True),),
            writes=(Access("keys", wanted_rows), Access("values", wanted_rows)),
            after=("rank",),
        )
        return (new, rank, revive, attend(shape, step, Rows(chosen), reads, after=("append", "revive")))

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`revive`: tokens that a decode step wants and this layer lacks."""
        share = self._share(model, layer)
        if step.prefilling or share >= 1:
            return ()
        most = step.past_tokens - part_of(step.past_tokens, share)
        source = "assumption: one in a thousand of the tokens that a layer lacks; no published figure"
        return (Count(name="revive", heads=1, maximum=most, share=0.001, spread=0.001, source=source),)

    def _share(self, model: ModelShape, layer: int) -> float:
        quarter = 4 * layer // model.n_layers
        return (1.0, self.keep_2, self.keep_3, self.keep_4)[quarter]

    def _lost_here(self, model: ModelShape, step: Step, layer: int) -> int:
        """Tokens of the prompt that reached the layer before and are not computed at this one."""
        if not layer or step.tokens < step.prompt_tokens:
            return 0
        before, here = self._share(model, layer - 1), self._share(model, layer)
        return part_of(step.prompt_tokens, before) - part_of(step.prompt_tokens, here)
