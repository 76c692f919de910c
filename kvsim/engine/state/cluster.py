"""The state of a simulation as arrays of records (`records.py`), and the numbers that stand for what is in them."""

from typing import NamedTuple

from kvsim.engine.caches.state import Prefixes
from kvsim.iteration import arrays, price

Floats = arrays.Floats
Ints = arrays.Ints
Records = arrays.Records
Record = arrays.Record
Prices = price.Prices

N_LINKS = 4
N_TIERS = 3
HBM, DDR, NVME = range(N_TIERS)
Need = tuple[int, int, int]  # bytes of each tier that something asks for
NOTHING = (0, 0, 0)

# A vector: of how many sequences it is, their bytes per tier, then of each operation its work, contiguous and scattered
# bytes. In the row of a batch, the first column says which structure the load has instead.
COUNT, STORED = 0, 1
VECTOR, SLOPE, PROMPTS = range(3)  # rows of `rows`: scratch, then prompts by structure, then the loads of a batch

NOBODY = -1  # no request
EVERYBODY = -1  # all tenants
REJECTED, TIMED_OUT = 1, 2  # why a request has left without an end
# Lists that a request can be in: the first two are a tenant's at a replica, the others a replica's. Where replicas
# process prompts or decode, HANDING are those whose state waits for a receiver, and INCOMING those whose state comes.
# In KEPT and PARKED are turns that are over, whose state is still in HBM, or in DDR.
WAITING, SWAPPED, PREFILLING, DECODING, HANDING, INCOMING, KEPT, PARKED, NOWHERE = range(9)
TENANT_QUEUES, QUEUES = 2, 8
FCFS, PRIORITY, FAIR = range(3)
TURNS_ANEW, TURNS_KEEP, TURNS_SWAP, TURNS_CHEAPEST = range(4)  # what becomes of their state
ROUND_ROBIN, LEAST_LOADED, PREFIX_AFFINITY, KV_AWARE = range(4)
NO_QUOTA = 1 << 62  # bytes: more than any memory has

# What a replica is about. RUNNING, STALLED and ITERATING last until `wake_s`; the others are left at once, but for a
# detour: they are the places at which a replica goes on after one.
IDLE, RUNNING, STALLED, ITERATING, SETTLING, JOINING, SCHEDULING, ADMITTING, READY = range(9)

WANT_PLAN, WANT_PROGRAM, WANT_TIMES, WANT_ROWS, WANT_LOOK = range(5)


class Detour(Exception):
    """The inner loop needs something from outside, `wanted` says what; it goes on where it stopped."""


MOST_PARTS = 32  # pieces of a run; one that would have more ends earlier
OPEN_SPANS = 16  # halvings of a run: more than the logarithm of its iterations


class Plans(NamedTuple):
    """The pieces of a policy's plans (`kvsim.plans.derive.Piece`)."""

    world: Record
    pieces: Records
    floors: Records
    terms: Records  # of floors, with coefficients, and monomials
    tests: Records
    matrix: Ints
    values: Ints  # (3, most): of the piece found last its inputs and floors, its monomials, and their growth


class Cluster(NamedTuple):
    """Everything else that the inner loop reads and writes."""

    world: Record
    requests: Records  # in the order of the trace
    inbound: Records  # of each request, where the op fidelity keeps the time
    order: Ints  # of arrival
    known: Ints  # a heap: those that waited for others and have a time of arrival now
    replicas: Records
    stages: Records  # (replicas, stages)
    meets: Floats  # (2, 2, replicas, stages, stages of a host): how stages meet those on their host
    spans: Floats  # (2, stages, micro-batches): scratch: when a micro-batch's layers begin and end on a stage
    tenants: Records  # (replicas, tenants)
    pins: Records
    patience: Records  # (different timeouts)
    sums: Ints  # (replicas, structures, 2, columns): vectors of decoding sequences in the next iteration, their growth
    rows: Ints  # (rows, columns)
    parts: Records  # (replicas, MOST_PARTS + OPEN_SPANS): of the run under way
    notes: Records
    gaps: Records
    aways: Records
    plans: Plans
    prefixes: Prefixes
    features: tuple[str, ...]  # that there are (`kvsim.engine.features`)
