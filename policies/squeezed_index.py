"""The index of Squeezed Attention: centroids of a prefix's keys on one or two levels, built and looked up."""

from typing import NamedTuple

from policies.model import LayerShape
from policies.plan import Access, Buffer, Compute, Plan, Rows, Tier, Work


class Centroids(NamedTuple):
    """For each KV head `fine` centroids of `keys` keys and, on two levels, `coarse` centroids of the fine ones."""

    shape: LayerShape
    keys: int
    fine: int
    coarse: int  # 0 on one level

    def buffers(self, dtype: str) -> tuple[Buffer, ...]:
        """Centroids of `dtype`, the label of each key, the size of each cluster; the scores of one layer."""
        heads, head_dim = self.shape.kv_heads, self.shape.head_dim
        fine = (
            Buffer("centroids", Tier.HBM, heads * self.fine, (head_dim,), dtype),
            Buffer("labels", Tier.HBM, heads, (self.keys,), "int32"),
            Buffer("sizes", Tier.HBM, heads, (self.fine,), "int32"),
            Buffer("scores", Tier.HBM, heads, (self.fine,), "fp32", ring=1),  # the largest of a group's query heads
        )
        if not self.coarse:
            return fine
        return (
            *fine,
            Buffer("coarse_centroids", Tier.HBM, heads * self.coarse, (head_dim,), dtype),
            Buffer("coarse_labels", Tier.HBM, heads, (self.fine,), "int32"),
            Buffer("coarse_sizes", Tier.HBM, heads, (self.coarse,), "int32"),
        )

    def build(self, keys: str, iterations: int) -> Plan:
        """k-means of the rows of `keys`, and of its centroids on two levels."""
        fine = self._cluster("cluster", keys, self.keys, "", self.fine, iterations, "attend")
        if not self.coarse:
            return (fine,)
        return (
            fine,
            self._cluster("cluster_coarse", "centroids", self.fine, "coarse_", self.coarse, iterations, "cluster"),
        )

    def calibrate(self, levels: tuple[str, ...], queries: Access) -> Compute:
        """Scores of the centroids of `levels` ("fine", "coarse"), averaged over `queries`: thresholds come of them."""
        heads = self.shape.kv_heads
        prefix = {"fine": "", "coarse": "coarse_"}
        return Compute(
            name="calibrate",
            work=Work.MATMUL,
            rows=Rows(queries.rows.fixed * self.centroids(levels)),
            flops_per_row=2 * self.shape.heads * self.shape.head_dim,
            reads=(
                queries,
                *(Access(f"{prefix[level]}centroids", Rows(heads * self.centroids((level,)))) for level in levels),
                *(Access(f"{prefix[level]}sizes", Rows(heads)) for level in levels),
            ),
            writes=(Access("calibrated", Rows(heads)),),
            after=("cluster_coarse" if self.coarse else "cluster",),
        )

    def centroids(self, levels: tuple[str, ...]) -> int:
        """Centroids per KV head on these levels."""
        return sum(self.coarse if level == "coarse" else self.fine for level in levels)

    def _cluster(
        self, name: str, source: str, points: int, prefix: str, centroids: int, iterations: int, after: str
    ) -> Compute:
        heads = self.shape.kv_heads
        visits = Rows(iterations * heads * points)
        return Compute(
            name=name,
            work=Work.NEAREST,
            rows=visits,
            flops_per_row=2 * self.shape.head_dim * centroids,
            reads=(Access(source, visits),),
            writes=(
                Access(f"{prefix}centroids", Rows(heads * centroids)),
                Access(f"{prefix}labels", Rows(heads)),
                Access(f"{prefix}sizes", Rows(heads)),
            ),
            after=(after,),
        )

    def lookup(self) -> tuple[Compute, ...]:
        """Score the centroids of one query: on two levels those below a coarse survivor, `survive` in number.

        Two passes over each level: the denominator of the softmax, then the scores.
        """
        heads, flops = self.shape.kv_heads, 2 * 2 * self.shape.group * self.shape.head_dim
        q, scores = Access("q", Rows(1)), (Access("scores", Rows(heads)),)
        if not self.coarse:
            fine = Access("centroids", Rows(2 * heads * self.fine))
            sizes = Access("sizes", Rows(heads))
            return (
                Compute(
                    name="score",
                    work=Work.MATMUL,
                    rows=Rows(heads * self.fine),
                    flops_per_row=flops,
                    reads=(q, fine, sizes),
                    writes=scores,
                    after=("qkv",),
                ),
            )
        coarse = Access("coarse_centroids", Rows(2 * heads * self.coarse))
        labels = Access("coarse_labels", Rows(heads))
        return (
            Compute(
                name="score_coarse",
                work=Work.MATMUL,
                rows=Rows(heads * self.coarse),
                flops_per_row=flops,
                reads=(q, coarse, Access("coarse_sizes", Rows(heads)), labels),
                after=("qkv",),
                draws=("survive",),
            ),
            Compute(
                name="score",
                work=Work.MATMUL,
                rows=Rows(0, (("survive", 1),)),
                flops_per_row=flops,
                reads=(
                    q,
                    Access("centroids", Rows(0, (("survive", 2),)), scattered=True),
                    Access("sizes", Rows(heads)),
                ),
                writes=scores,
                after=("score_coarse",),
            ),
        )
