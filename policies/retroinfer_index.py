"""RetroInfer's wave index: how many clusters a prompt has, what building them costs, and how a query ranks them."""

import math
from typing import NamedTuple

from policies.model import LayerShape
from policies.plan import Access, Buffer, Compute, Plan, Rows, Tier, Work


class Clusters(NamedTuple):
    """The index of one KV head: clustered tokens, clusters of them, and how many a step retrieves and estimates."""

    tokens: int
    clusters: int
    segment_clusters: int  # k-means runs within segments of the prompt
    retrieved: int = 0
    estimated: int = 0

    def buffers(self, shape: LayerShape, dtype: str) -> tuple[Buffer, ...]:
        """Mean keys and summed values of `dtype`; the row in which each cluster starts, and its size."""
        heads = shape.kv_heads
        return (
            Buffer("centroids", Tier.HBM, heads * self.clusters, (shape.head_dim,), dtype),
            Buffer("value_sums", Tier.HBM, heads * self.clusters, (shape.v_head_dim,), dtype),
            Buffer("starts", Tier.HBM, heads, (self.clusters,), "int32"),
            Buffer("sizes", Tier.HBM, heads, (self.clusters,), "int32"),
        )

    def build(self, shape: LayerShape, iterations: int, after: tuple[str, ...], keys: str, values: str) -> Plan:
        """K-means within segments, one last round over all clusters, then the members' values summed."""
        heads, d = shape.kv_heads, shape.head_dim
        members, means = Rows(heads * self.tokens), Rows(heads * self.clusters)
        ops = []
        rounds = (("cluster", self.segment_clusters * (iterations - 1)), ("assign", self.clusters))
        for name, products in rounds:
            ops.append(
                Compute(
                    name=name,  # spherical: the largest product decides
                    work=Work.NEAREST,
                    rows=members,
                    flops_per_row=2 * d * products,
                    reads=(Access(keys, members),),
                    writes=(Access("centroids", means),),
                    after=after,
                )
            )
            after = (name,)
        sums = Compute(
            name="sum_values",
            work=Work.ELEMENTWISE,
            rows=members,
            flops_per_row=shape.v_head_dim,
            reads=(Access(values, members, scattered=True),),
            writes=(Access("value_sums", means), Access("starts", Rows(heads)), Access("sizes", Rows(heads))),
            after=after,
        )
        return (*ops, sums)

    def lookup(self, shape: LayerShape, slots: int) -> Plan:
        """Softmax over all clusters for each query head, summed over a group, then the ranks of each KV head, and
        which of their blocks the cache has in its `slots`.
        """
        heads, read = shape.kv_heads, Rows(0, (("read", 1),))
        return (
            Compute(
                name="score",
                work=Work.MATMUL,
                rows=Rows(self.clusters),
                flops_per_row=2 * shape.heads * shape.head_dim,
                reads=(Access("q", Rows(1)), Access("centroids", Rows(heads * self.clusters))),
                writes=(Access("scores", Rows(shape.heads)),),
                after=("qkv",),
            ),
            Compute(
                name="aggregate",
                work=Work.ELEMENTWISE,
                rows=Rows(shape.heads * self.clusters),
                flops_per_row=4,
                reads=(Access("scores", Rows(2 * shape.heads)), Access("sizes", Rows(heads))),
                writes=(Access("head_scores", Rows(heads)),),
                after=("score",),
            ),
            Compute(
                name="select",
                work=Work.TOPK,
                rows=Rows(heads * self.clusters),
                reads=(Access("head_scores", Rows(heads)), Access("resident", Rows(slots))),
                writes=(Access("chosen", read), Access("resident", read)),
                after=("aggregate",),
                draws=("read", "miss"),
            ),
        )


def cluster_counts(prompt_tokens: int, cluster_tokens: int, segment_tokens: int) -> tuple[int, int]:
    """(clusters, clusters of one segment) of a prompt, by the authors' rule.

    The prompt has as many segments as are nearest to `segment_tokens`, at least one; the clusters are the multiple of
    8 and of the segments that is nearest to one for each `cluster_tokens`, the lower one of two, at least one multiple.
    """
    segments = max(1, (2 * prompt_tokens + segment_tokens) // (2 * segment_tokens))
    unit = math.lcm(8, segments)
    multiples = max(1, -((cluster_tokens * unit - 2 * prompt_tokens) // (2 * cluster_tokens * unit)))
    return multiples * unit, multiples * unit // segments
