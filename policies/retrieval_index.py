"""The indexes of RetrievalAttention: what each stores in DDR, how it is built from a prompt, what a search visits."""

from typing import NamedTuple

from policies.model import LayerShape
from policies.plan import Access, Buffer, Compute, Copy, Plan, Processor, Rows, Step, Tier, Work, part_of

KMEANS_ROUNDS = 10  # for the lists of an inverted file


class Flat(NamedTuple):
    """Every key is scanned, `scans` times for each KV head."""

    shape: LayerShape
    keys: int  # per KV head
    scans: int

    def state(self) -> tuple[Buffer, ...]:
        """Buffers beside the keys themselves."""
        return ()

    def build_buffers(self, step: Step) -> tuple[Buffer, ...]:
        """Buffers that only building needs."""
        return ()

    def build(self, step: Step) -> Plan:
        """Operations after `offload_keys` has brought the keys to DDR."""
        return ()

    def search(self) -> Compute:
        """Find the best keys of every query head."""
        return _scan(self.shape, self.keys, self.scans, 0)


class Ivf(NamedTuple):
    """Keys in `lists` by their nearest centroid; a search scans `share` of them."""

    shape: LayerShape
    keys: int
    scans: int
    lists: int
    share: float

    def state(self) -> tuple[Buffer, ...]:
        """Buffers beside the keys themselves."""
        heads = self.shape.kv_heads
        return (
            Buffer("list_centroids", Tier.DDR, heads * self.lists, (self.shape.head_dim,), "fp32"),
            Buffer("list_ids", Tier.DDR, heads * self.keys, (1,), "int32"),
        )

    def build_buffers(self, step: Step) -> tuple[Buffer, ...]:
        """Buffers that only building needs."""
        return ()

    def build(self, step: Step) -> Plan:
        """k-means over all keys, on the host."""
        heads = self.shape.kv_heads
        rounds = Rows(KMEANS_ROUNDS * heads * self.keys)
        return (
            Compute(
                name="build",
                work=Work.FACTOR,
                processor=Processor.CPU,
                rows=rounds,
                flops_per_row=2 * self.lists * self.shape.head_dim,
                reads=(Access("index_keys", rounds),),
                writes=(
                    Access("list_centroids", Rows(heads * self.lists)),
                    Access("list_ids", Rows(heads * self.keys)),
                ),
                after=("offload_keys",),
            ),
        )

    def search(self) -> Compute:
        """Rank the centroids, then scan the nearest lists."""
        return _scan(self.shape, part_of(self.keys, self.share), self.scans, self.lists)


class Graph(NamedTuple):
    """The paper's query-aware graph: `degree` neighbours of each key for each query head."""

    shape: LayerShape
    keys: int
    degree: int
    expanded: int

    def state(self) -> tuple[Buffer, ...]:
        """Buffers beside the keys themselves."""
        return (Buffer("graph", Tier.DDR, self.shape.heads * self.keys, (self.degree,), "int32"),)

    def build_buffers(self, step: Step) -> tuple[Buffer, ...]:
        """Neighbours of the prompt's queries on their way to the host, one layer at a time."""
        rows = self.shape.heads * step.prompt_tokens
        return (
            Buffer("neighbours", Tier.HBM, rows, (self.degree,), "int32", ring=1),
            Buffer("neighbours_host", Tier.DDR, rows, (self.degree,), "int32", ring=1),
        )

    def build(self, step: Step) -> Plan:
        """Every prompt query's exact nearest keys, on the GPU; then links between keys that one query found."""
        shape, links = self.shape, Rows(self.shape.heads * step.prompt_tokens)
        linked = Rows(shape.heads * self.keys)
        queries = "q" if step.whole_prompt else "queries"
        return (
            Compute(
                name="neighbours",
                work=Work.MATMUL,
                rows=Rows(step.prompt_tokens * self.keys),
                flops_per_row=2 * shape.heads * shape.head_dim,
                reads=(Access(queries, Rows(step.prompt_tokens)), Access("raw_keys", Rows(shape.kv_heads * self.keys))),
                writes=(Access("neighbours", links),),
                after=("attend", "neighbours_down@-1"),
            ),
            Copy(
                name="neighbours_down",
                src="neighbours",
                dst="neighbours_host",
                rows=links,
                after=("neighbours", "build@-1"),
            ),
            Compute(
                name="build",  # link keys that are neighbours of one query, prune by distance
                work=Work.FACTOR,
                processor=Processor.CPU,
                rows=linked,
                flops_per_row=2 * shape.head_dim * self.degree,
                reads=(Access("neighbours_host", links), Access("index_keys", linked, scattered=True)),
                writes=(Access("graph", linked),),
                after=("neighbours_down", "offload_keys"),
            ),
        )

    def search(self) -> Compute:
        """Best-first search; each distance that it computes is a visit."""
        visited = Rows(0, (("visited", 1),))
        return Compute(
            name="search",
            work=Work.MATMUL,
            processor=Processor.CPU,
            rows=visited,
            flops_per_row=2 * self.shape.head_dim,
            reads=(
                Access("q_host", Rows(1)),
                Access("index_keys", visited, scattered=True),
                Access("graph", Rows(self.shape.heads * self.expanded), scattered=True),
            ),
            writes=(Access("found", Rows(self.shape.heads)),),
            after=("wait_query",),
            draws=("visited",),
        )


Index = Flat | Ivf | Graph


def _scan(shape: LayerShape, keys: int, scans: int, lists: int) -> Compute:
    ranked = (Access("list_centroids", Rows(shape.kv_heads * scans * lists)),) if lists else ()
    return Compute(
        name="search",
        work=Work.MATMUL,
        processor=Processor.CPU,
        rows=Rows(shape.heads * (keys + lists)),
        flops_per_row=2 * shape.head_dim,
        reads=(Access("q_host", Rows(1)), Access("index_keys", Rows(shape.kv_heads * scans * keys)), *ranked),
        writes=(Access("found", Rows(shape.heads)),),
        after=("wait_query",),
    )
