"""The inner loop and what it needs from outside: plans, programs and times that it has not met, and prefix caches."""

import math

import numpy as np

from kvsim.derive import PlanTable, Structure
from kvsim.engine.books import note_now
from kvsim.engine.iteration import first_load
from kvsim.engine.loop import arrive, play
from kvsim.engine.plans import INPUTS
from kvsim.engine.sessions import next_arrival
from kvsim.engine.state import (
    AWAY,
    BOUNDS,
    COUNT,
    GAP,
    IDLE,
    MOST_PARTS,
    NO_QUOTA,
    NOBODY,
    NOTE,
    NOWHERE,
    OPEN_SPANS,
    PART,
    PIN,
    PROMPTS,
    REPLICA,
    REQUEST,
    RUNNING,
    STORED,
    TENANT,
    TIERS,
    WANT_ACCEPT,
    WANT_LOOK,
    WANT_MATCH,
    WANT_PLAN,
    WANT_PROGRAM,
    WANT_ROUTE,
    WANT_ROWS,
    WANT_STORE,
    WANT_TIMES,
    WORLD,
    Cluster,
    Detour,
    Ints,
    Record,
    Records,
)
from kvsim.engine.tables import model_arrays, plan_arrays, price_arrays
from kvsim.handoff import SentState
from kvsim.machine import HEAD_KERNELS, Sharing
from kvsim.makespan import Clock, Load
from kvsim.prefix_service import PrefixService
from kvsim.prefix_tiers import PrefixTiers
from kvsim.routing import Router, prefill_estimate
from kvsim.setup import CACHE_ROUTERS, ROUTERS, SCHEDULERS, Setup
from kvsim.tenants import Tenant, terms_of
from kvsim.timeline import Span, Timeline
from policies import Reuse, reuse_of
from traces import Trace
from traces.sessions import Followers, followers

WATERMARK = 0.01  # of HBM kept free at admission (as vLLM)
ROWS_AT_ONCE = 1 << 20  # so large that their memory is given back when they are freed, and none is used until written
DETOURS_AT_ONCE = 100  # each starts the count of turns anew


class Engine:
    """All replicas of a cluster; `prefixes` holds their prefix caches, where they have any."""

    def __init__(self, trace: Trace, setup: Setup, table: PlanTable, clock: Clock, prefixes: PrefixTiers) -> None:
        self.table, self.clock = table, clock
        prefill_s = prefill_estimate(table, clock, setup.max_num_batched_tokens)
        routes = setup.router in CACHE_ROUTERS
        self._router = Router(trace, setup, clock.machine, prefixes, prefill_s) if routes else None
        self._derived: tuple[int, ...] = ()  # what plan was asked for last
        self._structures: list[Structure] = []
        self._structure_index: dict[int, int] = {}
        self._pieces = [*table.pieces]
        self._combinations: list[tuple[int, ...]] = []
        self._written: list[list[Records]] = [[], [], []]  # notes, gaps and aways that were full
        self.timeline = Timeline(clock, setup.perfetto) if setup.perfetto else None
        self._model, self._model_s = model_arrays(clock, max(setup.max_num_batched_tokens, setup.max_num_seqs))
        self.cluster = _cluster(trace, setup, clock, prefixes)
        self._wanted = self.cluster.world["wanted"]
        self._prefixes = PrefixService(trace, setup, clock.machine, prefixes, self.cluster, prefill_s)
        self._lay_out_plans()
        self._lay_out_prices()
        for number in range(setup.replicas):
            note_now(self.cluster, number, 0.0)
        if setup.fidelity == "step":
            self.play(0)  # compiles the loop, or loads it

    def play(self, most_turns: int) -> bool:
        """Give replicas their turns, about so many at most; False when nothing is left to happen."""
        from kvsim.engine import compiled

        for _ in range(DETOURS_AT_ONCE):
            try:
                return bool(compiled.play(self.cluster, self._prices, NOBODY, 0.0, most_turns))
            except Detour:
                self._serve()
        return True

    def turn(self, number: int, now_s: float) -> None:
        """Let a replica end what it did and begin what is next, up to something that lasts."""
        while True:
            try:
                play(self.cluster, self._prices, number, now_s, 1)
                return
            except Detour:
                self._serve()

    def arrive(self, index: int, now_s: float) -> int:
        """Queue a request at a replica, which is returned."""
        while True:
            try:
                return arrive(self.cluster, index, now_s)
            except Detour:
                self._serve()

    def next_arrival(self) -> int:
        """The request that arrives next, as far as is known; -1 when no arrival is."""
        return next_arrival(self.cluster)

    def batch(self) -> tuple[list[Load], int, int]:
        """The iteration begun last: its loads, tokens and rows of the head."""
        world, first = self.cluster.world, first_load(self.cluster)
        loads = [self._load(int(row[0]), row) for row in self.cluster.rows[first : first + world["loads"]]]
        return loads, int(world["tokens"]), int(world["logits"])

    def _load(self, structure: int, row: Ints) -> Load:
        shape = self._structures[structure]
        return Load(shape, np.roll(row[STORED : STORED + shape.columns], -TIERS))

    @property
    def left(self) -> int:
        """Requests that finished or were rejected."""
        return int(self.cluster.replicas["left"].sum())

    def take_notes(self) -> dict[str, Records]:
        """Memory and queue lengths at the boundaries of iterations as columns, in order for each replica.

        They are handed over: what is taken is no longer kept, so that no row is in memory twice.
        """
        chunks = self._take(0)
        sizes = sum(np.bincount(chunk["replica"], minlength=len(self.cluster.replicas)) for chunk in chunks)
        ends, total = np.cumsum(sizes), int(np.sum(sizes))
        next_row = ends - sizes
        columns = {name: np.empty(total, NOTE[name]) for name in NOTE.names or ()}
        while chunks:
            chunk = chunks.pop()
            chunk = chunk[np.argsort(chunk["replica"], kind="stable")]
            counts = np.bincount(chunk["replica"], minlength=len(next_row))
            rows = np.repeat(next_row - np.cumsum(counts) + counts, counts) + np.arange(len(chunk))
            for name, column in columns.items():
                column[rows] = chunk[name]
            next_row += counts
        return columns

    def take_requests(self) -> Records:
        """What became of each request, handed over."""
        del self._prefixes  # which refers to them
        requests, self.cluster = self.cluster.requests, self.cluster._replace(requests=self.cluster.requests[:0].copy())
        return requests

    def take_gaps(self) -> Records:
        """Gaps between tokens, handed over."""
        return np.concatenate(self._take(1)[::-1])

    def take_aways(self) -> Records:
        """From when to when which requests were preempted, in order of their return; handed over."""
        return np.concatenate(self._take(2)[::-1])

    def _take(self, kind: int) -> list[Records]:
        """The rows of a kind, the newest first, which are no longer kept."""
        chunks = [*self._written[kind], self._filled()[kind].copy()]
        self._written[kind] = []
        return chunks[::-1]

    def _filled(self) -> tuple[Records, Records, Records]:
        cluster, world = self.cluster, self.cluster.world
        return cluster.notes[: world["notes"]], cluster.gaps[: world["gaps"]], cluster.aways[: world["aways"]]

    # -- what the loop asks for ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        cluster, world = self.cluster, self.cluster.world
        wanted, *arguments = self._wanted.tolist()
        if wanted == WANT_PLAN:
            kind, *inputs = arguments
            if self._derived == (wanted_plan := (kind, *inputs)):
                raise ValueError(
                    f"the plan of {self.table.policy.name} at {inputs[: INPUTS[kind]]} tokens needs numbers above "
                    "64 bits; use shorter contexts or shares with fewer digits"
                )
            self._derived = wanted_plan
            self._pieces.append(self.table.derive(tuple(inputs[: INPUTS[kind]])))
            self._lay_out_plans()
        elif wanted == WANT_PROGRAM:
            first = first_load(cluster)
            self._combinations.append(tuple(cluster.rows[first : first + world["loads"], 0].tolist()))
            self._lay_out_prices()
        elif wanted == WANT_TIMES:
            tokens = arguments[0]
            self._model_s[tokens], busy_s, weight_bytes = self.clock.own_layers(tokens)
            busy_s = np.concatenate([busy_s, self.clock.own_bounds_s(tokens), np.zeros(len(BOUNDS) - 2)])
            self._model[tokens] = (1, weight_bytes, self.clock.collective_bytes(tokens), busy_s)
        elif wanted == WANT_ROWS:
            for written, rows in zip(self._written, self._filled(), strict=True):
                written.append(rows)
            world["notes"] = world["gaps"] = world["aways"] = 0
            fresh = {name: np.zeros_like(getattr(cluster, name)) for name in ("notes", "gaps", "aways")}
            self.cluster = cluster._replace(**fresh)
        elif wanted == WANT_LOOK:
            self._look(arguments[0])
        elif wanted == WANT_ROUTE:
            self._route(arguments[0])
        elif wanted == WANT_MATCH:
            self._prefixes.match(arguments[0])
        elif wanted == WANT_ACCEPT:
            self._prefixes.accept()
        elif wanted == WANT_STORE:
            self._prefixes.store(arguments[0])

    def _route(self, index: int) -> None:
        if self._router is None:
            raise RuntimeError("a router that sees no prefix caches asked for a look into them")
        self.cluster.requests[index]["replica"] = self._router.choose(self.cluster, index)
        self.cluster.world["routed"] = index

    def _look(self, number: int) -> None:
        """Show what a replica has begun."""
        if self.timeline is None:
            raise RuntimeError("a replica is looked at, and nobody looks")
        cluster, replica, began_s = self.cluster, self.cluster.replicas[number], float(self.cluster.world["look_s"])
        sharing = Sharing(int(replica["on_host"]), int(replica["on_switch"]))
        if replica["phase"] == RUNNING:
            sums, tokens = cluster.sums[number], int(replica["decoding_now"])
            used = np.flatnonzero(sums[:, 0, COUNT])
            loads, growth = ([self._load(s, sums[s, i]) for s in used.tolist()] for i in (0, 1))
            parts = cluster.parts[number][: replica["n_parts"]]
            steps = [(int(part["steps"]), float(part["first_s"]), float(part["slope_s"])) for part in parts]
            span = Span(began_s, float(replica["run_stall_s"]), steps, loads, growth, tokens, tokens, sharing)
        else:
            loads, tokens, logits = self.batch()
            steps = [(1, float(replica["wake_s"]) - began_s, 0.0)]
            stall_s = began_s - float(replica["began_s"])
            span = Span(began_s - stall_s, stall_s, steps, loads, [], tokens, logits, sharing)
        self.timeline.begin(number, span)

    # -- arrays --------------------------------------------------------------------------------------------------

    def _lay_out_plans(self) -> None:
        for piece in self._pieces:
            if id(piece.structure) not in self._structure_index:
                self._structure_index[id(piece.structure)] = len(self._structures)
                self._structures.append(piece.structure)
        plans = plan_arrays(self._pieces, self._structure_index, self.cluster.world)
        self.cluster = self.cluster._replace(plans=plans)
        if self.cluster.sums.shape[1] < len(self._structures):
            self._widen(len(self._structures), 1 + max(structure.columns for structure in self._structures))
            self._lay_out_prices()

    def _widen(self, structures: int, columns: int) -> None:
        old = self.cluster.sums
        sums = np.zeros((len(old), structures, 2, columns), np.int64)
        sums[:, : old.shape[1], :, : old.shape[3]] = old
        loads = 2 * structures  # of decode and of prefill
        rows = np.zeros((PROMPTS + structures + loads, columns), np.int64)
        self.cluster = self.cluster._replace(sums=sums, rows=rows)

    def _lay_out_prices(self) -> None:
        self._prices = price_arrays(self.clock, self._structures, self._combinations, self._model, self._model_s)


def _cluster(trace: Trace, setup: Setup, clock: Clock, prefixes: PrefixTiers) -> Cluster:
    """The state before anything has happened, without plans."""
    world, requests = _world(setup, clock), _requests(trace, setup)
    return Cluster(
        world=world,
        requests=requests,
        order=np.full(len(trace), NOBODY),
        known=np.full(len(trace), NOBODY),
        replicas=_replicas(setup, prefixes),
        tenants=_tenants(trace, setup, requests),
        pins=_pins(trace, setup, requests),
        sums=np.zeros((setup.replicas, 0, 2, 0), np.int64),
        rows=np.zeros((0, 0), np.int64),
        parts=np.zeros((setup.replicas, MOST_PARTS + OPEN_SPANS), dtype=PART),
        notes=np.zeros(ROWS_AT_ONCE + 6 * setup.max_num_seqs, dtype=NOTE),
        gaps=np.zeros(ROWS_AT_ONCE + 4 * setup.max_num_seqs, dtype=GAP),
        aways=np.zeros(4 * setup.max_num_seqs, dtype=AWAY),
        plans=plan_arrays([], {}, world),
    )


def _requests(trace: Trace, setup: Setup) -> Records:
    requests = np.zeros(len(trace), dtype=REQUEST)
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        requests[name] = getattr(trace, name)
    for name in ("admitted_s", "first_token_s", "finish_s", "last_token_s", "stream_s"):
        requests[name] = np.nan
    requests["queue"], requests["matched"] = NOWHERE, -1
    requests["receiver"] = requests["sender"] = NOBODY
    requests["leader"] = requests["follower"] = requests["sibling"] = NOBODY
    if setup.sessions == "closed":
        _lead(requests, followers(trace))
    if setup.prefill_gpus:
        state = SentState(setup.policy, setup.rank)
        requests["sent"] = [state.bytes_of(tokens) for tokens in trace.prompt_tokens.tolist()]
    return requests


def _lead(requests: Records, waits: Followers) -> None:
    """Let requests arrive after those that they waited for."""
    for name in ("leader", "delay_s", "after_end"):
        requests[name] = getattr(waits, name)
    for index in np.flatnonzero(waits.leader != NOBODY).tolist()[::-1]:
        leader = requests[waits.leader[index]]
        requests[index]["arrival_s"], requests[index]["sibling"] = np.nan, leader["follower"]
        leader["follower"] = index


def _tenants(trace: Trace, setup: Setup, requests: Records) -> Records:
    """The tenants of each replica; where nothing depends on whose a request is, all are one."""
    terms = terms_of(setup.tenants, trace.tenants)
    if setup.scheduler == "fcfs" and all(one.quota == 1 for one in terms):
        terms = [Tenant()]
    else:
        requests["tenant"] = trace.tenant
    tenants = np.zeros((setup.replicas, len(terms)), dtype=TENANT)
    hbm_bytes, *_ = setup.capacity()
    tenants["weight"], tenants["priority"] = [one.weight for one in terms], [one.priority for one in terms]
    tenants["quota_bytes"] = [int(one.quota * hbm_bytes) if one.quota < 1 else NO_QUOTA for one in terms]
    tenants["watermark_bytes"] = [int(WATERMARK * one.quota * hbm_bytes) for one in terms]
    tenants["first"] = tenants["last"] = NOBODY
    return tenants


def _pins(trace: Trace, setup: Setup, requests: Records) -> Records:
    """The ranges of replicas that requests may go to."""
    front = setup.prefill_replicas or setup.replicas  # those that take requests
    ranges = [one.replicas or (0, front - 1) for one in terms_of(setup.tenants, trace.tenants)]
    known = list(dict.fromkeys(ranges))
    requests["pin"] = np.array([known.index(one) for one in ranges])[trace.tenant]
    pins = np.zeros(len(known), dtype=PIN)
    pins["first"] = [first for first, _ in known]
    pins["n_replicas"] = [last - first + 1 for first, last in known]
    return pins


def _replicas(setup: Setup, prefixes: PrefixTiers) -> Records:
    replicas = np.zeros(setup.replicas, dtype=REPLICA)
    per_host, sharing = setup.replicas_per_host, setup.machine().sharing
    numbers = np.arange(setup.replicas)
    replicas["phase"], replicas["wake_s"], replicas["next_due"] = IDLE, math.inf, np.iinfo(np.int64).max
    replicas["first"] = replicas["last"] = replicas["left_queue"] = NOBODY
    replicas["first_neighbour"] = numbers // per_host * per_host
    replicas["n_neighbours"] = np.minimum(per_host, setup.replicas - replicas["first_neighbour"])
    replicas["on_host"], replicas["on_switch"] = sharing
    replicas["cached"] = [bool(caches) for caches in prefixes.caches]
    return replicas


def _world(setup: Setup, clock: Clock) -> Record:
    world = np.zeros(1, dtype=WORLD)[0]
    rates, host, capacity = setup.gpu.rates, setup.host, setup.capacity()
    world["max_num_seqs"], world["max_num_batched_tokens"] = setup.max_num_seqs, setup.max_num_batched_tokens
    world["capacity_bytes"], world["watermark_bytes"] = capacity, int(WATERMARK * capacity[0])
    world["swaps"], world["step_by_step"] = setup.preemption == "swap", setup.fidelity == "op"
    world["router"], world["scheduler"] = ROUTERS.index(setup.router), SCHEDULERS.index(setup.scheduler)
    world["prompt_weight"], world["output_weight"] = setup.prompt_token_weight, setup.output_token_weight
    world["tp"], world["gpus_per_switch"] = setup.tp, host.gpus_per_switch
    world["head_bytes"] = clock.model.head_bytes
    world["head_s"], world["logit_s"] = clock.head_parts_s
    world["window_from_s"], world["window_to_s"] = setup.perfetto or (math.inf, -math.inf)
    world["head_launch_s"] = HEAD_KERNELS * rates.launch_s
    world["prefill_replicas"], world["layers"] = setup.prefill_replicas, setup.rank.n_layers
    world["streams_chunks"] = reuse_of(setup.policy) is Reuse.BLOCKS
    machine = clock.machine
    for name, (latency_s, rate_Bps) in (("peer", machine.peer), ("nic", machine.nic)):
        world[f"{name}_latency_s"], world[f"{name}_byte_s"] = latency_s, 1 / rate_Bps if rate_Bps else math.inf
    world["pcie_latency_s"] = rates.pcie_latency_s
    world["pcie_up_s"], world["pcie_down_s"] = 1 / rates.pcie_h2d_Bps, 1 / rates.pcie_d2h_Bps
    world["ddr_Bps"], world["switch_Bps"] = host.ddr_Bps, host.switch_Bps
    world["routed"] = NOBODY
    return world
