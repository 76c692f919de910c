"""The plan: what a policy stores, moves and computes, stated once and without torch.

Two drivers walk a plan: the simulator charges each operation time, the runtime executes it.  Everything here is plain
data, so a plan can be compared, hashed, printed and tested without a GPU.

`Buffer`   what is stored, where, in rows; one row is one contiguous piece and bytes always derive from it.
`Copy`     moves rows between two memory tiers; only the driver does that.
`Compute`  works where the data is; reads and writes rows of buffers of its own tier.
`Sync`     makes the host wait for the device, or the device for the host.
`Count`    a number that data decide (cache misses, ragged selections), drawn by one `Compute` and used by later rows.

Operations run on lanes: the SMs, the CPU, copies to the GPU, copies to the host. A lane runs its operations in the
order in which plan and model list them; across lanes only `after` orders two operations, so whatever touches the same
rows from two lanes must be ordered by it, a ring's next layer included.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import cached_property

from policies.dtypes import row_bytes

SHARE_UNITS = 10**6
MODEL_OPS = ("qkv", "mlp")  # the model's own work in a layer: before the policy's, and after its `attend`


class Tier(StrEnum):
    """A memory, named relative to the GPU that runs the sequence."""

    HBM = "hbm"
    DDR = "ddr"
    NVME = "nvme"


class Processor(StrEnum):
    """Where a `Compute` runs; each processor reaches one tier."""

    SM = "sm"
    CPU = "cpu"

    @property
    def tier(self) -> Tier:
        """The memory whose buffers this processor reads and writes."""
        return Tier.HBM if self is Processor.SM else Tier.DDR


class Engine(StrEnum):
    """What moves the rows of a `Copy`: the copy engine, a zero-copy kernel on the SMs, or CPU threads."""

    DMA = "dma"
    GATHER = "gather"
    CPU = "cpu"


class Work(StrEnum):
    """What kind of arithmetic a `Compute` does, which decides the rates that bound it."""

    ATTENTION = "attention"  # scores, softmax and weighted values in one kernel
    MATMUL = "matmul"  # dense products on the tensor cores
    FACTOR = "factor"  # decompositions in fp32
    NEAREST = "nearest"  # clustering, and graphs of neighbours: products of which the largest of a row count
    ELEMENTWISE = "elementwise"  # reductions, copies within a tier, gathers
    TOPK = "topk"  # `rows` are the elements that are searched


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of one sequence: `new_tokens` are processed while `past_tokens` are already held.

    A step is prefill until the prompt is complete; each later step is decode. After the step the sequence holds
    `tokens`, of which `generated_tokens` are its own output fed back.
    """

    prompt_tokens: int
    past_tokens: int
    new_tokens: int

    @classmethod
    def decoding(cls, prompt_tokens: int, generated_tokens: int) -> "Step":
        """The decode step that feeds output token number `generated_tokens` (from 1) back into the model."""
        return cls(prompt_tokens=prompt_tokens, past_tokens=prompt_tokens + generated_tokens - 1, new_tokens=1)

    @property
    def tokens(self) -> int:
        """Tokens held after the step."""
        return self.past_tokens + self.new_tokens

    @property
    def generated_tokens(self) -> int:
        """Tokens held after the step that are not of the prompt."""
        return max(0, self.past_tokens + self.new_tokens - self.prompt_tokens)

    @property
    def prefilling(self) -> bool:
        """Whether this step still processes the prompt."""
        return self.past_tokens < self.prompt_tokens

    @property
    def last_chunk(self) -> bool:
        """Whether this step completes the prompt, so that what is built at its end is due."""
        return self.past_tokens < self.prompt_tokens <= self.past_tokens + self.new_tokens

    @property
    def whole_prompt(self) -> bool:
        """Whether this one step processes the prompt from end to end, layer after layer."""
        return self.past_tokens == 0 and self.last_chunk


@dataclass(frozen=True)
class Buffer:
    """`rows` contiguous pieces of shape `row_shape` in one tier, for one sequence.

    `ring` = 0: every layer has its own; `ring` = k: k of them serve all layers in turn (staging). `view`: the bytes
    belong to something that is counted elsewhere, an activation or another layer's cache.
    """

    name: str
    tier: Tier
    rows: int
    row_shape: tuple[int, ...]
    dtype: str = "bf16"
    ring: int = 0
    view: bool = False

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row, quantisation scales included."""
        return row_bytes(self.row_shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of one instance of the buffer."""
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class Rows:
    """A number of rows: `fixed`, plus a coefficient for each named count (hits are `budget - miss`)."""

    fixed: int = 0
    counts: tuple[tuple[str, int], ...] = ()

    def at(self, totals: Mapping[str, int]) -> int:
        """The rows once every count, summed over KV heads, is known; raises KeyError for a count not given."""
        return self.fixed + sum(coefficient * totals[name] for name, coefficient in self.counts)


@dataclass(frozen=True, slots=True)
class Access:
    """Rows of one buffer that a `Compute` reads or writes; `scattered` rows lie at indices that data decide."""

    buffer: str
    rows: Rows
    scattered: bool = False


def part_of(rows: int, share: float) -> int:
    """`share` of `rows` to the nearest row, halves up, in integer arithmetic on `share` to six decimals.

    More would make the polynomials that are derived from plans exceed 64 bits.
    """
    exact = Fraction(round(share * SHARE_UNITS), SHARE_UNITS)
    return (2 * rows * exact.numerator + exact.denominator) // (2 * exact.denominator)


def pieces_of(tokens: int, piece_tokens: int) -> int:
    """Pages, chunks or blocks of `piece_tokens` that so many tokens in a row can lie on, wherever the first stands."""
    return (tokens + piece_tokens - 2) // piece_tokens + 1 if tokens else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """A count that data decide: per sequence and, `heads` times, per KV head.

    Each head has between `minimum` and `maximum`. The default distribution is a Beta of mean `share` and standard
    deviation `spread`, both as shares of `maximum`; its mean is no less than `least_mean` rows, where there are as
    many. `source` says where they come from. A recording replaces them.
    """

    name: str
    heads: int
    maximum: int
    share: float
    spread: float
    source: str
    minimum: int = 0
    least_mean: int = 0

    def expected(self, share: float | None = None) -> int:
        """The sum over heads at the mean, or at another mean `share`, each head rounded to whole rows."""
        if share is not None:
            return self.heads * max(self.minimum, part_of(self.maximum, share))
        mean = max(part_of(self.maximum, self.share), min(self.least_mean, self.maximum))
        return self.heads * max(self.minimum, mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Moves rows from a buffer of one tier to a buffer of another; performed by the driver, never by a policy.

    `ids` names the buffers that hold source and destination slots; without it the rows are one contiguous run.
    """

    name: str
    src: str
    dst: str
    rows: Rows
    engine: Engine = Engine.DMA
    ids: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """A kernel of `rows * flops_per_row` FLOPs that reads and writes rows of its processor's tier.

    `after` names earlier operations of this layer, the model's `qkv`, or as `op@-k` those of the k-th layer before.
    `draws` names the counts that this kernel decides. `launches` is 0 for an operation that shares the launch of the
    one before it.
    """

    name: str
    work: Work
    processor: Processor = Processor.SM
    rows: Rows = Rows()
    flops_per_row: int = 0
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    after: tuple[str, ...] = ()
    draws: tuple[str, ...] = ()
    launches: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """The host waits for the device before work that depends on data can be issued."""

    name: str
    after: tuple[str, ...] = ()


Op = Copy | Compute | Sync
Plan = tuple[Op, ...]


def moved_bytes(plan: Plan, buffers: Iterable[Buffer], totals: Mapping[str, int]) -> Counter[tuple[Tier, Tier]]:
    """Bytes per (source, destination) tier of one layer, given its counts: what both drivers must agree on."""
    of = {b.name: b for b in buffers}
    moved: Counter[tuple[Tier, Tier]] = Counter()
    for op in plan:
        if isinstance(op, Copy):
            moved[of[op.src].tier, of[op.dst].tier] += op.rows.at(totals) * of[op.src].row_bytes
    return moved


def flops(plan: Plan, totals: Mapping[str, int]) -> int:
    """FLOPs of one layer's plan, given its counts."""
    return sum(op.rows.at(totals) * op.flops_per_row for op in plan if isinstance(op, Compute))


def stored_bytes(layers: Sequence[Sequence[Buffer]]) -> Counter[Tier]:
    """Bytes held per tier over all layers: a ring is held once, at its largest."""
    held: Counter[Tier] = Counter()
    rings: dict[tuple[Tier, str], int] = {}
    same = Counter(map(id, layers))  # layers that share their buffers are counted, not walked
    for buffers in {id(own): own for own in layers}.values():
        for b in buffers:
            if b.view:
                continue
            if b.ring:
                rings[b.tier, b.name] = max(rings.get((b.tier, b.name), 0), b.ring * b.nbytes)
            else:
                held[b.tier] += same[id(buffers)] * b.nbytes
    for (tier, _), nbytes in rings.items():
        held[tier] += nbytes
    return held
