"""Squeezed Attention: cluster a fixed prefix once, read only the keys whose cluster matters to the query."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, pair_flops, raw_buffers, raw_prefill
from policies.model import ModelShape
from policies.plan import Access, Buffer, Compute, Copy, Count, Engine, Plan, Rows, Step, Tier, Work, part_of
from policies.policy import Policy, Reuse, at_least, one_of, share_of
from policies.squeezed_index import Centroids


@dataclass(frozen=True, slots=True, kw_only=True)
class SqueezedAttention(Policy):
    """The prompt is the fixed prefix: its keys are clustered, and a key is read when its cluster's score is above a
    threshold calibrated so that the share `keep` of all keys of all layers passes. Generated tokens are always read.

    `levels=2` scores `coarse_share` centroids first and of the fine ones only those below a coarse survivor.
    `tier="ddr"` keeps keys and values in host memory and gathers the chosen rows. `budget_tokens` replaces the
    threshold by a fixed number of keys per KV head.
    """

    name: ClassVar[str] = "squeezed-attention"
    paper: ClassVar[str] = "Squeezed Attention, Hooper et al. 2024, arXiv:2411.09688"
    reuse: ClassVar[Reuse] = Reuse.PREFIX

    keep: float = 0.1
    centroid_share: float = 0.05
    levels: int = 1
    coarse_share: float = 0.01
    coarse_keep: float = 0.3
    observation_tokens: int = 100
    kmeans_iterations: int = 10
    tier: str = "hbm"
    budget_tokens: int | None = None

    def __post_init__(self) -> None:
        share_of(self, "keep", "centroid_share", "coarse_share", "coarse_keep")
        at_least(self, observation_tokens=1, kmeans_iterations=1, levels=1)
        one_of(self, "tier", "hbm", "ddr")
        if self.levels > 2:
            raise ValueError(f"squeezed-attention: levels={self.levels} must be 1 or 2")
        if self.levels == 2 and self.coarse_share >= self.centroid_share:
            raise ValueError(
                f"squeezed-attention: coarse_share={self.coarse_share} must be below "
                f"centroid_share={self.centroid_share}"
            )
        if self.budget_tokens is not None:
            at_least(self, budget_tokens=1)

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """The prefix must yield a centroid on each level beside the observation window."""
        least = self.coarse_share if self.levels == 2 else self.centroid_share
        return self.observation_tokens + int(1 / least) + 1

    def index(self, model: ModelShape, prompt_tokens: int, layer: int) -> Centroids:
        """The sizes of one layer's index; the observation window at the prompt's end belongs to no cluster."""
        keys = prompt_tokens - self.observation_tokens
        coarse = part_of(keys, self.coarse_share) if self.levels == 2 else 0
        return Centroids(model.layers[layer], keys, part_of(keys, self.centroid_share), coarse)

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """Keys and values of the prefix in their tier, exact rows and the index in HBM."""
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        views = activations(model, step, layer)
        if step.prefilling:
            views += raw_buffers(model, step, layer)
            if not step.last_chunk:
                return views
        index, home = self.index(model, step.prompt_tokens, layer), Tier(self.tier)
        exact, chosen = heads * self._exact_tokens(step), heads * min(index.keys, 2 * self._kept(index.keys))
        # Rows that were raw and stay in HBM keep their place: at the end of a chunked prompt raw buffers count them.
        same = step.last_chunk and not step.whole_prompt and home is Tier.HBM
        state = (
            Buffer("k_exact", Tier.HBM, exact, (shape.head_dim,), model.kv_dtype, view=same),
            Buffer("v_exact", Tier.HBM, exact, (shape.v_head_dim,), model.kv_dtype, view=same),
            Buffer("keys", home, heads * index.keys, (shape.head_dim,), model.kv_dtype, view=same),
            Buffer("values", home, heads * index.keys, (shape.v_head_dim,), model.kv_dtype, view=same),
            *index.buffers(model.dtype),
        )
        # Selections are ragged: what exceeds these rows comes in a second wave.
        state += (Buffer("chosen", Tier.HBM, chosen, (1,), "int32", ring=1),)
        if home is Tier.DDR:
            state += (
                Buffer("k_staged", Tier.HBM, chosen, (shape.head_dim,), model.kv_dtype, ring=1),
                Buffer("v_staged", Tier.HBM, chosen, (shape.v_head_dim,), model.kv_dtype, ring=1),
            )
        return (*views, *state)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense; at the end cluster the keys and score them with the observation window for the threshold."""
        moves = ("offload_keys", "offload_values") if self.tier == "ddr" and step.last_chunk else ()
        ops = raw_prefill(model, step, layer, moves)
        if not step.last_chunk:
            return ops
        heads, index = model.layers[layer].kv_heads, self.index(model, step.prompt_tokens, layer)
        exact, prefix = Rows(heads * self._exact_tokens(step)), Rows(heads * index.keys)
        build = index.build(
            self.kmeans_iterations, self.observation_tokens, min(self.observation_tokens, step.new_tokens)
        )
        set_aside = Compute(
            name="set_aside",
            work=Work.ELEMENTWISE,
            reads=(Access("raw_keys", exact), Access("raw_values", exact)),
            writes=(Access("k_exact", exact), Access("v_exact", exact)),
            after=("attend",),
        )
        if moves:
            copies = tuple(
                Copy(name=name, src=f"raw_{home}", dst=home, rows=prefix, after=("append",))
                for name, home in zip(moves, ("keys", "values"), strict=True)
            )
            return (*ops, *build, set_aside, *copies)
        store = Compute(
            name="store",
            work=Work.ELEMENTWISE,
            reads=(Access("raw_keys", prefix), Access("raw_values", prefix)),
            writes=(Access("keys", prefix), Access("values", prefix)),
            after=("attend",),
        )
        return (*ops, *build, set_aside, store)

    def prefill_end(self, model: ModelShape, step: Step) -> Plan:
        """The thresholds: on each level a quantile over the scores of all layers, heads and keys."""
        if not step.last_chunk or self.budget_tokens is not None:
            return ()
        keys = sum(x.kv_heads for x in model.layers) * (step.prompt_tokens - self.observation_tokens)
        return (Compute(name="threshold", work=Work.TOPK, rows=Rows(keys * self.levels)),)

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Score centroids, keep the keys above the threshold, attend to them and to all exact rows."""
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        index, exact = self.index(model, step.prompt_tokens, layer), Rows(heads * self._exact_tokens(step))
        fixed = self.budget_tokens is not None
        kept = Rows(heads * self._kept(index.keys)) if fixed else Rows(0, (("keep", 1),))
        select = Compute(
            name="select",  # labels to scores, compare, compact to a list of indices
            work=Work.ELEMENTWISE,
            rows=Rows(heads * index.keys),
            flops_per_row=1,
            reads=(Access("labels", Rows(heads)), Access("scores", Rows(shape.heads))),
            writes=(Access("chosen", kept),),
            after=("score",),
            draws=() if fixed else ("keep",),
        )
        fetch = tuple(
            Copy(
                name=f"fetch_{home}",
                src=home,
                dst=staged,
                rows=kept,
                engine=Engine.GATHER,
                ids=("chosen",),
                after=("select",),
            )
            for home, staged in (("keys", "k_staged"), ("values", "v_staged"))
            if self.tier == "ddr"
        )
        sparse = ("k_staged", "v_staged") if fetch else ("keys", "values")
        attention = Compute(
            name="attend",
            work=Work.ATTENTION,
            rows=Rows(exact.fixed + kept.fixed, kept.counts),
            # Ragged heads: pairs are counted over KV heads, so the FLOPs of a pair are those of one group.
            flops_per_row=pair_flops(shape, step) // heads,
            reads=(
                Access("q", Rows(1)),
                Access("k_exact", exact),
                Access("v_exact", exact),
                *(Access(name, kept, scattered=not fetch) for name in sparse),
            ),
            writes=(Access("out", Rows(1)),),
            after=("append", "select", *(op.name for op in fetch)),
        )
        new = append(step, ("k_exact", "v_exact"), ("new_k", "new_v"), heads)
        return (new, *index.lookup(), select, *fetch, attention)

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`keep`: keys above the threshold; `survive`: fine centroids below a coarse survivor."""
        if step.prefilling:
            return ()
        heads, index = model.layers[layer].kv_heads, self.index(model, step.prompt_tokens, layer)
        counts: tuple[Count, ...] = ()
        if self.budget_tokens is None:
            source = "the threshold's quantile; the spread over heads is an assumption"
            counts += (
                Count(name="keep", heads=heads, maximum=index.keys, share=self.keep, spread=0.08, source=source),
            )
        if index.coarse:
            source = "the coarse quantile; the spread is an assumption"
            counts += (
                Count(
                    name="survive", heads=heads, maximum=index.fine, share=self.coarse_keep, spread=0.1, source=source
                ),
            )
        return counts

    def _kept(self, keys: int) -> int:
        return part_of(keys, self.keep) if self.budget_tokens is None else min(keys, self.budget_tokens)

    def _exact_tokens(self, step: Step) -> int:
        return self.observation_tokens + step.generated_tokens
