"""The indexes of RetrievalAttention: what each stores in DDR, how it is built from a prompt, what a search visits."""

from typing import NamedTuple

from policies.model import LayerShape
from policies.plan import Access, Buffer, Compute, Copy, Plan, Processor, Rows, Step, Tier, Work, part_of

KMEANS_ROUNDS = 10  # for the lists of an inverted file
TRAIN_QUERIES = 8192  # of the prompt, that the graph of a KV head learns from
ENTRIES = 32  # keys at which a search of a graph begins, for each KV head
FOLLOWED_EACH = 0.25  # keys whose links a search of a graph reads, for each that it visits, on average


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
        """Buffers beside the keys themselves, which lie in the order of their lists."""
        heads = self.shape.kv_heads
        return (
            Buffer("list_centroids", Tier.DDR, heads * self.lists, (self.shape.head_dim,), "fp32"),
            Buffer("list_starts", Tier.DDR, heads * (self.lists + 1), (1,), "int32"),  # and where the last list ends
            Buffer("list_ids", Tier.DDR, heads * self.keys, (1,), "int32"),
        )

    def build_buffers(self, step: Step) -> tuple[Buffer, ...]:
        """Buffers that only building needs."""
        return ()

    def build(self, step: Step) -> Plan:
        """k-means over all keys, on the host; then they change places."""
        heads = self.shape.kv_heads
        rounds, once = Rows(KMEANS_ROUNDS * heads * self.keys), Rows(heads * self.keys)
        passes = Rows(rounds.fixed + once.fixed)
        return (
            Compute(
                name="build",
                work=Work.NEAREST,
                processor=Processor.CPU,
                rows=rounds,
                flops_per_row=2 * self.lists * self.shape.head_dim,
                reads=(Access("index_keys", passes), Access("padding_host", Rows(1))),
                writes=(
                    Access("index_keys", once),
                    Access("list_centroids", Rows(heads * self.lists)),
                    Access("list_starts", Rows(heads * (self.lists + 1))),
                    Access("list_ids", once),
                ),
                after=("offload_keys", "offload_padding"),
            ),
        )

    def search(self) -> Compute:
        """Rank the centroids, then scan the nearest lists."""
        return _scan(self.shape, part_of(self.keys, self.share), self.scans, self.lists)


class Graph(NamedTuple):
    """A query-aware graph for each KV head, which its query heads share: `degree` links of each key.

    The paper has one for each query head; they would differ only in which of the prompt's queries they learn from.
    """

    shape: LayerShape
    keys: int
    degree: int

    def state(self) -> tuple[Buffer, ...]:
        """Buffers beside the keys themselves."""
        heads = self.shape.kv_heads
        return (
            Buffer("graph", Tier.DDR, heads * self.keys, (self.degree,), "int32"),
            Buffer("entries", Tier.DDR, heads * ENTRIES, (1,), "int32"),
        )

    def build_buffers(self, step: Step) -> tuple[Buffer, ...]:
        """The graph on its way to the host, one layer at a time."""
        heads = self.shape.kv_heads
        return (
            Buffer("links", Tier.HBM, heads * self.keys, (self.degree,), "int32", ring=1),
            Buffer("entry_points", Tier.HBM, heads * ENTRIES, (1,), "int32", ring=1),
        )

    def build(self, step: Step) -> Plan:
        """On the GPU: the exact nearest keys of the queries learnt from, and twice those of every key itself.

        By inner product, and by how alike the queries score them. Choosing among these candidates, and leading to keys
        that no link led to, is small beside finding them.
        """
        heads = self.shape.kv_heads
        links, entries = Rows(heads * self.keys), Rows(heads * ENTRIES)
        learnt = min(TRAIN_QUERIES, self.shape.group * step.prompt_tokens)
        return (
            Compute(
                name="build",
                work=Work.NEAREST,
                rows=links,
                flops_per_row=2 * self.shape.head_dim * (learnt + 2 * self.keys),
                reads=(
                    Access("q" if step.whole_prompt else "queries", Rows(step.prompt_tokens)),
                    Access("keys_fp32", links),
                ),
                writes=(Access("links", links), Access("entry_points", entries)),
                after=("split", "offload_graph@-1", "offload_entries@-1"),
            ),
            Copy(name="offload_graph", src="links", dst="graph", rows=links, after=("build",)),
            Copy(name="offload_entries", src="entry_points", dst="entries", rows=entries, after=("build",)),
        )

    def search(self) -> Compute:
        """Best-first search; each distance that it computes is a visit, each key whose links it reads is followed."""
        visited = Rows(0, (("visited", 1),))
        return Compute(
            name="search",
            work=Work.MATMUL,
            processor=Processor.CPU,
            rows=visited,
            flops_per_row=2 * self.shape.head_dim,
            reads=(
                Access("q_host", Rows(1)),
                Access("entries", Rows(self.shape.kv_heads * ENTRIES)),
                Access("index_keys", visited, scattered=True),
                Access("graph", Rows(0, (("followed", 1),)), scattered=True),
            ),
            writes=(Access("found", Rows(self.shape.heads)),),
            after=("wait_query",),
            draws=("visited", "followed"),
        )


Index = Flat | Ivf | Graph


def _scan(shape: LayerShape, keys: int, scans: int, lists: int) -> Compute:
    ranked: tuple[Access, ...] = ()
    if lists:
        ranked = (
            Access("list_centroids", Rows(shape.kv_heads * scans * lists)),
            Access("list_starts", Rows(shape.kv_heads * (lists + 1))),
        )
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
