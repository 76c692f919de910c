"""Squeezed Attention: cluster a fixed prefix once, read only the keys whose cluster matters to the query."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, raw_buffers, raw_prefill
from policies.model import ModelShape
from policies.plan import Access, Buffer, Compute, Copy, Count, Engine, Plan, Rows, Step, Tier, Work, part_of
from policies.policy import Policy, Reuse, at_least, one_of, share_of


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
                f"squeezed-attention: coarse_share={self.coarse_share} must be below centroid_share={self.centroid_share}"
            )
        if self.budget_tokens is not None:
            at_least(self, budget_tokens=1)

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """The prefix must yield a centroid on each level beside the observation window."""
        least = self.coarse_share if self.levels == 2 else self.centroid_share
        return self.observation_tokens + int(1 / least) + 1

    def clustered(self, prompt_tokens: int) -> int:
        """Keys of a KV head that belong to a cluster: the prefix without its observation window."""
        return prompt_tokens - self.observation_tokens

    def centroids(self, prompt_tokens: int) -> int:
        """Fine centroids per KV head."""
        return part_of(self.clustered(prompt_tokens), self.centroid_share)

    def coarse_centroids(self, prompt_tokens: int) -> int:
        """Coarse centroids per KV head, none on one level."""
        return part_of(self.clustered(prompt_tokens), self.coarse_share) if self.levels == 2 else 0

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """Keys and values of the prefix in their tier, exact rows and centroids with labels and sizes in HBM."""
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        views = activations(model, step, layer)
        if step.prefilling and not step.last_chunk:
            return (*views, *raw_buffers(model, step, layer))
        keys, fine = self.clustered(step.prompt_tokens), self.centroids(step.prompt_tokens)
        coarse, exact = self.coarse_centroids(step.prompt_tokens), heads * self._exact_tokens(step)
        centroids = [
            Buffer("centroids", Tier.HBM, heads * fine, (shape.head_dim,), model.dtype),
            Buffer("labels", Tier.HBM, heads, (keys,), "int32"),
            Buffer("sizes", Tier.HBM, heads, (fine,), "int32"),
            Buffer("scores", Tier.HBM, shape.heads, (fine,), "fp32", ring=1),
        ]
        if coarse:
            centroids += [
                Buffer("coarse_centroids", Tier.HBM, heads * coarse, (shape.head_dim,), model.dtype),
                Buffer("coarse_labels", Tier.HBM, heads, (fine,), "int32"),
                Buffer("coarse_sizes", Tier.HBM, heads, (coarse,), "int32"),
            ]
        exact_rows = (
            Buffer("k_exact", Tier.HBM, exact, (shape.head_dim,), model.kv_dtype),
            Buffer("v_exact", Tier.HBM, exact, (shape.v_head_dim,), model.kv_dtype),
        )
        home = Tier(self.tier)
        prefix = [
            Buffer("keys", home, heads * keys, (shape.head_dim,), model.kv_dtype),
            Buffer("values", home, heads * keys, (shape.v_head_dim,), model.kv_dtype),
        ]
        if home is Tier.DDR:  # selections are ragged: what exceeds the staging rows comes in a second wave
            staged = heads * min(keys, 2 * self._kept(keys))
            prefix += [
                Buffer("k_staged", Tier.HBM, staged, (shape.head_dim,), model.kv_dtype, ring=1),
                Buffer("v_staged", Tier.HBM, staged, (shape.v_head_dim,), model.kv_dtype, ring=1),
                Buffer("chosen", Tier.HBM, staged, (1,), "int32", ring=1),
            ]
        raw = raw_buffers(model, step, layer) if step.last_chunk else ()
        return (*views, *raw, *centroids, *exact_rows, *prefix)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense; at the end cluster the keys and score them with the observation window for the threshold."""
        ops = raw_prefill(model, step, layer)
        if not step.last_chunk:
            return ops
        shape, heads, prompt = model.layers[layer], model.layers[layer].kv_heads, step.prompt_tokens
        keys, fine, coarse = self.clustered(prompt), self.centroids(prompt), self.coarse_centroids(prompt)
        clustered, exact = Rows(heads * keys), Rows(heads * self._exact_tokens(step))
        new = [
            Compute(
                name="cluster",
                work=Work.FACTOR,
                rows=Rows(self.kmeans_iterations * heads * keys),
                flops_per_row=2 * shape.head_dim * fine,
                reads=(Access("raw_keys", Rows(self.kmeans_iterations * heads * keys)),),
                writes=(
                    Access("centroids", Rows(heads * fine)),
                    Access("labels", Rows(heads)),
                    Access("sizes", Rows(heads)),
                ),
                after=("attend",),
            ),
            Compute(
                name="calibrate",
                work=Work.MATMUL,
                rows=Rows(self.observation_tokens * fine),
                flops_per_row=2 * shape.heads * shape.head_dim,
                reads=(Access("centroids", Rows(heads * fine)),),
                writes=(Access("scores", Rows(shape.heads)),),
                after=("cluster",),
            ),
        ]
        if coarse:
            new.append(
                Compute(
                    name="cluster_coarse",
                    work=Work.FACTOR,
                    rows=Rows(self.kmeans_iterations * heads * fine),
                    flops_per_row=2 * shape.head_dim * coarse,
                    reads=(Access("centroids", Rows(self.kmeans_iterations * heads * fine)),),
                    writes=(
                        Access("coarse_centroids", Rows(heads * coarse)),
                        Access("coarse_labels", Rows(heads)),
                        Access("coarse_sizes", Rows(heads)),
                    ),
                    after=("cluster",),
                )
            )
        new.append(
            Compute(
                name="set_aside",
                work=Work.ELEMENTWISE,
                reads=(Access("raw_keys", exact), Access("raw_values", exact)),
                writes=(Access("k_exact", exact), Access("v_exact", exact)),
                after=("attend",),
            )
        )
        if self.tier == "ddr":
            moves = [
                Copy(name=f"offload_{name}", src=f"raw_{name}", dst=name, rows=clustered, after=("append",))
                for name in ("keys", "values")
            ]
            return (*ops, *new, *moves)
        store = Compute(
            name="store",
            work=Work.ELEMENTWISE,
            reads=(Access("raw_keys", clustered), Access("raw_values", clustered)),
            writes=(Access("keys", clustered), Access("values", clustered)),
            after=("attend",),
        )
        return (*ops, *new, store)

    def prefill_end(self, model: ModelShape, step: Step) -> Plan:
        """The threshold: a quantile over the scores of all layers, heads and keys."""
        if not step.last_chunk or self.budget_tokens is not None:
            return ()
        scored = sum(x.kv_heads for x in model.layers if x.kind == "full") * self.clustered(step.prompt_tokens)
        return (Compute(name="threshold", work=Work.TOPK, rows=Rows(scored * self.levels)),)

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Score centroids, keep the keys above the threshold, attend to them and to all exact rows."""
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        keys, fine = self.clustered(step.prompt_tokens), self.centroids(step.prompt_tokens)
        coarse, exact = self.coarse_centroids(step.prompt_tokens), Rows(heads * self._exact_tokens(step))
        draws_keep = self.budget_tokens is None
        kept = Rows(0, (("keep", 1),)) if draws_keep else Rows(heads * self._kept(keys))
        flops = 2 * 2 * shape.group * shape.head_dim  # two passes: the denominator, then the normalised scores
        ops = [append(step, ("k_exact", "v_exact"), ("new_k", "new_v"), heads)]
        if coarse:
            ops.append(
                Compute(
                    name="score_coarse",
                    work=Work.MATMUL,
                    rows=Rows(heads * coarse),
                    flops_per_row=flops,
                    reads=(Access("q", Rows(1)), Access("coarse_centroids", Rows(2 * heads * coarse))),
                    after=("qkv",),
                    draws=("survive",),
                )
            )
        scored = Rows(0, (("survive", 1),)) if coarse else Rows(heads * fine)
        scored_twice = Rows(0, (("survive", 2),)) if coarse else Rows(2 * heads * fine)
        ops += [
            Compute(
                name="score",
                work=Work.MATMUL,
                rows=scored,
                flops_per_row=flops,
                reads=(Access("q", Rows(1)), Access("centroids", scored_twice, scattered=bool(coarse))),
                writes=(Access("scores", Rows(shape.heads)),),
                after=("score_coarse",) if coarse else ("qkv",),
            ),
            Compute(
                name="select",  # labels to scores, compare, compact to a list of indices
                work=Work.ELEMENTWISE,
                rows=Rows(heads * keys),
                flops_per_row=1,
                reads=(Access("labels", Rows(heads)), Access("scores", Rows(shape.heads))),
                after=("score",),
                draws=("keep",) if draws_keep else (),
            ),
        ]
        # Ragged heads: pairs are counted over KV heads, so the FLOPs of a pair are those of one group.
        pairs = Rows(exact.fixed + kept.fixed, kept.counts)
        home = ("keys", "values") if self.tier == "hbm" else ("k_staged", "v_staged")
        fetch = (
            ()
            if self.tier == "hbm"
            else tuple(
                Copy(
                    name=f"fetch_{name}",
                    src=name,
                    dst=staged,
                    rows=kept,
                    engine=Engine.GATHER,
                    ids=("chosen",),
                    after=("select",),
                )
                for name, staged in (("keys", "k_staged"), ("values", "v_staged"))
            )
        )
        attention = Compute(
            name="attend",
            work=Work.ATTENTION,
            rows=pairs,
            flops_per_row=2 * shape.group * (shape.head_dim + shape.v_head_dim),
            reads=(
                Access("q", Rows(1)),
                Access("k_exact", exact),
                Access("v_exact", exact),
                *(Access(name, kept, scattered=True) for name in home),
            ),
            writes=(Access("out", Rows(1)),),
            after=("append", "select", *(op.name for op in fetch)),
        )
        return (*ops, *fetch, attention)

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """`keep`: keys above the threshold; `survive`: fine centroids below a coarse survivor."""
        if step.prefilling:
            return ()
        heads, keys = model.layers[layer].kv_heads, self.clustered(step.prompt_tokens)
        counts: list[Count] = []
        if self.budget_tokens is None:
            source = "the threshold's quantile; the spread over heads is an assumption"
            counts.append(Count(name="keep", heads=heads, maximum=keys, share=self.keep, spread=0.08, source=source))
        if self.levels == 2:
            fine, source = self.centroids(step.prompt_tokens), "the coarse quantile; the spread is an assumption"
            counts.append(
                Count(name="survive", heads=heads, maximum=fine, share=self.coarse_keep, spread=0.1, source=source)
            )
        return tuple(counts)

    def _kept(self, keys: int) -> int:
        return min(keys, part_of(keys, self.keep) if self.budget_tokens is None else self.budget_tokens)

    def _exact_tokens(self, step: Step) -> int:
        return self.observation_tokens + step.generated_tokens
