"""Squeezed Attention: cluster a fixed prefix once, read only the keys whose cluster matters to the query."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, causal_pairs, pair_flops
from policies.model import ModelShape
from policies.plan import Access, Buffer, Compute, Copy, Count, Engine, Plan, Rows, Step, Tier, Work, part_of
from policies.policy import Policy, Reuse, at_least, one_of, share_of
from policies.squeezed_index import Centroids


@dataclass(frozen=True, slots=True, kw_only=True)
class SqueezedAttention(Policy):
    """The prompt is the fixed prefix: its keys are clustered, and a key is read when its cluster's score is above a
    threshold calibrated so that the share `keep` of all keys of all layers passes. Generated tokens are always read,
    and so are the first `sink_tokens`, which belong to no cluster (0: the paper's own form).

    `group_score` makes one score of those of a group's query heads, their mean or the largest (the authors' code has
    no groups). `levels=2` scores
    `coarse_share` centroids first and of the fine ones only those below a coarse survivor. `tier="ddr"` keeps keys and
    values in host memory and gathers the chosen rows. `budget_tokens` replaces the threshold of the fine centroids by a
    fixed number of keys per KV head, those of the highest scores.
    """

    name: ClassVar[str] = "squeezed-attention"
    paper: ClassVar[str] = "Squeezed Attention, Hooper et al. 2024, arXiv:2411.09688"
    reuse: ClassVar[Reuse] = Reuse.PREFIX
    by_shape: ClassVar[bool] = True

    keep: float = 0.1
    centroid_share: float = 0.05
    levels: int = 1
    coarse_share: float = 0.01
    coarse_keep: float = 0.3
    observation_tokens: int = 100
    kmeans_iterations: int = 10
    tier: str = "hbm"
    budget_tokens: int | None = None
    sink_tokens: int = 4
    group_score: str = "max"

    def __post_init__(self) -> None:
        share_of(self, "keep", "centroid_share", "coarse_share", "coarse_keep")
        at_least(self, observation_tokens=1, kmeans_iterations=1, levels=1, sink_tokens=0)
        one_of(self, "group_score", "mean", "max")
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
        """The prefix must yield a centroid on each level beside the sinks and the observation window."""
        least = self.coarse_share if self.levels == 2 else self.centroid_share
        return self.sink_tokens + self.observation_tokens + int(1 / least) + 1

    def index(self, model: ModelShape, prompt_tokens: int, layer: int) -> Centroids:
        """The sizes of one layer's index; sinks and the observation window at the prompt's end belong to no cluster."""
        keys = prompt_tokens - self.sink_tokens - self.observation_tokens
        coarse = part_of(keys, self.coarse_share) if self.levels == 2 else 0
        return Centroids(model.layers[layer], keys, part_of(keys, self.centroid_share), coarse)

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The levels that have a threshold."""
        return (("fine",) if self.budget_tokens is None else ()) + (("coarse",) if self.levels == 2 else ())

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`kv`: one row per token and KV head, of a prompt or, in HBM, of everything; the index in HBM.

        From host memory: `prefix` is there; `exact`, the sinks, the observation window and what was generated, stays.
        """
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        row = (2, shape.head_dim) if shape.head_dim == shape.v_head_dim else (shape.head_dim + shape.v_head_dim,)
        in_host, state = self.tier == "ddr", activations(model, step, layer)
        if step.prefilling or not in_host:
            ring = int(in_host and step.whole_prompt)
            state += (Buffer("kv", Tier.HBM, heads * step.tokens, row, model.kv_dtype, ring),)
        if step.prefilling and not step.whole_prompt and self.calibrated:
            window = min(step.tokens, self.observation_tokens)
            state += (Buffer("observed", Tier.HBM, window, (shape.heads, shape.head_dim), model.dtype),)
        if step.prefilling and not step.last_chunk:
            return state
        index = self.index(model, step.prompt_tokens, layer)
        state += index.buffers(model.dtype)
        if self.calibrated:
            state += (Buffer("thresholds", Tier.HBM, len(self.calibrated), (1,), "fp32"),)
        if step.prefilling:
            state += (Buffer("prompt_keys", Tier.HBM, heads * step.tokens, (shape.head_dim,), model.kv_dtype, 0, True),)
            if self.calibrated:
                scores = (index.centroids(self.calibrated),)
                state += (Buffer("calibrated", Tier.HBM, heads, scores, "fp32"),)
        most = index.keys if self.budget_tokens is None else self._kept(index.keys)
        state += (Buffer("chosen", Tier.HBM, heads * most, (1,), "int32", ring=1),)
        if in_host:
            # Selections are ragged: what exceeds the staged rows comes in further waves.
            staged = min(most, 2 * self._kept(index.keys))
            state += (
                Buffer("exact", Tier.HBM, heads * self._exact_tokens(step), row, model.kv_dtype),
                Buffer("prefix", Tier.DDR, heads * index.keys, row, model.kv_dtype),
                Buffer("staged", Tier.HBM, heads * staged, row, model.kv_dtype, ring=1),
            )
        return state

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense; at the end cluster the keys and score them with the observation window for the threshold."""
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        moves, held = self.tier == "ddr" and step.last_chunk, Rows(heads * step.tokens)
        free = ("offload@-1",) if moves and step.whole_prompt else ()
        pairs = Rows(causal_pairs(step.past_tokens, step.new_tokens))
        ops: Plan = (
            append(step, ("kv",), ("new_k", "new_v"), heads, free),
            attend(shape, step, pairs, (Access("kv", held),)),
        )
        window = Rows(min(self.observation_tokens, step.new_tokens))
        chunked = bool(self.calibrated) and not step.whole_prompt
        if chunked:
            ops += (
                Compute(
                    name="keep_queries",
                    work=Work.ELEMENTWISE,
                    reads=(Access("q", window),),
                    writes=(Access("observed", window),),
                    after=("qkv",),
                ),
            )
        if not step.last_chunk:
            return ops
        index = self.index(model, step.prompt_tokens, layer)
        ops += index.build("prompt_keys", self.kmeans_iterations)
        if self.calibrated:
            queries = Access("observed" if chunked else "q", Rows(self.observation_tokens))
            ops += (index.calibrate(self.calibrated, queries),)
        if not moves:
            return ops
        exact, prefix = Rows(heads * self._exact_tokens(step)), Rows(heads * index.keys)
        set_aside = Compute(
            name="set_aside",
            work=Work.ELEMENTWISE,
            reads=(Access("kv", exact),),
            writes=(Access("exact", exact),),
            after=("append",),
        )
        return (*ops, set_aside, Copy(name="offload", src="kv", dst="prefix", rows=prefix, after=("append",)))

    def prefill_end(self, model: ModelShape, step: Step) -> Plan:
        """The thresholds: on each level a quantile over the scores of all layers, heads and keys.

        All keys of a cluster have its score, so what is sorted are the centroids, each weighing as many as its keys.
        """
        if not step.last_chunk or not self.calibrated:
            return ()
        scores = sum(
            shape.kv_heads * self.index(model, step.prompt_tokens, layer).centroids(self.calibrated)
            for layer, shape in enumerate(model.layers)
        )
        return (Compute(name="threshold", work=Work.TOPK, rows=Rows(scores)),)

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Score centroids, keep the keys above the threshold, attend to them and to all exact rows."""
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        index, exact = self.index(model, step.prompt_tokens, layer), Rows(heads * self._exact_tokens(step))
        fixed, in_host = self.budget_tokens is not None, self.tier == "ddr"
        kept = Rows(heads * self._kept(index.keys)) if fixed else Rows(0, (("keep", 1),))
        select = Compute(
            name="select",  # labels to scores, compare, compact to a list of indices
            work=Work.ELEMENTWISE,
            rows=Rows(heads * index.keys),
            flops_per_row=1,
            reads=(Access("labels", Rows(heads)), Access("scores", Rows(heads))),
            writes=(Access("chosen", kept),),
            after=("score",),
            draws=() if fixed else ("keep",),
        )
        fetch = Copy(
            name="fetch",
            src="prefix",
            dst="staged",
            rows=kept,
            engine=Engine.GATHER,
            ids=("chosen",),
            after=("select",),
        )
        attention = Compute(
            name="attend",
            work=Work.ATTENTION,
            rows=Rows(exact.fixed + kept.fixed, kept.counts),
            # Ragged heads: pairs are counted over KV heads, so the FLOPs of a pair are those of one group.
            flops_per_row=pair_flops(shape, step) // heads,
            reads=(
                Access("q", Rows(1)),
                Access("exact" if in_host else "kv", exact),
                Access("staged" if in_host else "kv", kept, scattered=not in_host),
            ),
            writes=(Access("out", Rows(1)),),
            after=("append", "select", *(("fetch",) if in_host else ())),
        )
        new = append(step, ("exact" if in_host else "kv",), ("new_k", "new_v"), heads)
        return (new, *index.lookup(), select, *((fetch,) if in_host else ()), attention)

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
        return self.sink_tokens + self.observation_tokens + step.generated_tokens
