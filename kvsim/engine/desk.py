"""The inner loop and what it needs from outside: plans, programs and times that it has not met."""

import math

import numpy as np

from kvsim.engine.batch.estimate import prefill_s
from kvsim.engine.batch.load import first_load, scheduled
from kvsim.engine.batch.plans import INPUTS
from kvsim.engine.books.replica import note_now
from kvsim.engine.caches.tiers import PrefixTiers
from kvsim.engine.loop import arrive, play
from kvsim.engine.micro_batches import MicroBatch, load_of, of_iteration, pieces_of, round_of
from kvsim.engine.player import Player
from kvsim.engine.requests.arrivals import next_arrival
from kvsim.engine.requests.patience import depart, departure_s, next_departure
from kvsim.engine.speculation import guess
from kvsim.engine.state.cluster import (
    COUNT,
    DECODING,
    INCOMING,
    NOBODY,
    PREFILLING,
    PROMPTS,
    RUNNING,
    WANT_LOOK,
    WANT_PLAN,
    WANT_PROGRAM,
    WANT_ROWS,
    WANT_TIMES,
    Cluster,
    Detour,
    Ints,
    Records,
)
from kvsim.engine.state.initial import initial_cluster, set_turns
from kvsim.engine.state.records import NOTE
from kvsim.engine.state.tables import PlanArrays, own_arrays
from kvsim.iteration.busy import BUSY
from kvsim.iteration.clock import Clock, Load
from kvsim.iteration.timeline import STALL, Span, Timeline
from kvsim.plans.derive import Piece, PlanTable, Structure
from kvsim.scenario.setup import Setup
from policies.plan import Tier
from traces import Trace

DETOURS_AT_ONCE = 100  # each starts the count of events anew


class Engine:
    """All replicas of a cluster; `prefixes` holds their prefix caches, where they have any.

    `runs` is how many simulations like this one are coming.
    """

    def __init__(
        self, trace: Trace, setup: Setup, table: PlanTable, clock: Clock, prefixes: PrefixTiers, runs: int = 1
    ) -> None:
        self.table, self.clock = table, clock
        self._derived: tuple[int, ...] = ()  # what plan was asked for last
        self._structures: list[Structure] = []
        self._structure_index: dict[int, int] = {}
        self._plan_arrays = PlanArrays()
        self._combinations: list[tuple[int, ...]] = []
        self._written: list[list[Records]] = [[], [], []]  # notes, gaps and aways that were full
        self.timeline = Timeline(clock, setup.perfetto) if setup.perfetto else None
        self._stages = setup.stages.layers
        self.cached_shares = prefixes.stage_shares if prefixes.on else setup.held_shares(Tier.HBM)
        self._clocks = [Clock(rank, clock.machine) for rank in setup.stages.ranks] if setup.pp > 1 else [clock]
        self._own, self._own_s, self._head = own_arrays(clock, setup.most_tokens, setup.pp)
        self.cluster = initial_cluster(trace, setup, clock, prefixes)
        self._wanted = self.cluster.world["wanted"]
        self._lay_out_plans(table.pieces)
        self._lay_out_prices()
        set_turns(self.cluster, trace, setup)
        for number in range(setup.replicas):
            note_now(self.cluster, number, 0.0)
        self._player = Player(self.cluster.features, len(trace), runs)

    def play(self, most_events: int) -> bool:
        """Let events happen, about so many at most; False when nothing is left to happen."""
        for _ in range(DETOURS_AT_ONCE):
            try:
                return self._player.play(self.cluster, self._prices, most_events)
            except Detour:
                self._serve()
        return True

    def step(self, number: int, now_s: float) -> None:
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
                return arrive(self.cluster, self._prices, index, now_s)
            except Detour:
                self._serve()

    def prefill_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        """How long a prompt's prefill takes by itself."""
        while True:
            try:
                return prefill_s(self.cluster, self._prices, prompt_tokens, cached_tokens)
            except Detour:
                self._serve()

    def next_arrival(self) -> int:
        """The request that arrives next, as far as is known; -1 when no arrival is."""
        return next_arrival(self.cluster)

    def next_departure(self) -> tuple[int, float]:
        """The request that loses patience next, as far as is known, and when; -1 and never when none does."""
        index = next_departure(self.cluster)
        return index, departure_s(self.cluster, index)

    def depart(self, index: int, now_s: float) -> int:
        """Let a request leave without its first token; its replica is returned."""
        return depart(self.cluster, index, now_s)

    def inbound(self, number: int) -> list[tuple[int, int]]:
        """The requests that wait at a replica for state that has not set out yet, with its place in their order."""
        requests, found = self.cluster.requests, []
        for queue in (PREFILLING, INCOMING):
            index = int(self.cluster.replicas[number]["first"][queue])
            while index != NOBODY:
                inbound = self.cluster.inbound[index]
                if requests[index]["ready_s"] == math.inf and inbound["nbytes"]:
                    found.append((int(inbound["serial"]), index))
                index = int(requests[index]["after"])
        return found

    def streams(self, number: int) -> list[tuple[int, int, tuple[float, float]]]:
        """Whose state leaves a replica in this iteration, where to, and what a layer adds to it in HBM and in DDR."""
        world, found = self.cluster.world, []
        index = int(self.cluster.replicas[number]["first"][PREFILLING])
        while index != NOBODY:
            request = self.cluster.requests[index]
            share = request["chunk_tokens"] / request["prompt_tokens"]
            if not world["streams_chunks"]:
                last = request["past_tokens"] + request["chunk_tokens"] == request["prompt_tokens"]
                share = float(last and share > 0)
            if request["receiver"] != NOBODY and share:
                hbm_bytes, ddr_bytes, *_ = (share / world["layers"] * request["sent"]).tolist()
                found.append((index, int(request["receiver"]), (hbm_bytes, ddr_bytes)))
            index = int(request["after"])
        return found

    def batch(self, number: int) -> tuple[list[Load], int, int, float]:
        """What a replica's iteration under way computes: loads, tokens, rows of the head, and seconds of guessing."""
        batch, decoding = scheduled(self.cluster, number, 0, 1), int(self.cluster.replicas[number]["length"][DECODING])
        loads = [self._load(int(row[0]), row) for row in batch.loads]
        prompt_tokens = int(batch.tokens - decoding * self.cluster.world["step_tokens"])
        return loads, int(batch.tokens), int(batch.logits), self._guess_s(decoding, prompt_tokens)

    def _guess_s(self, sequences: int, prompt_tokens: int) -> float:
        return guess(self.cluster.world, np.zeros(len(BUSY)), sequences, prompt_tokens)

    def micro_batches(self, number: int) -> list[MicroBatch]:
        """The same of each micro-batch of a pipeline."""
        return of_iteration(self.cluster, self._structures, number)

    def _load(self, structure: int, row: Ints) -> Load:
        return load_of(self._structures, structure, row)

    @property
    def left(self) -> int:
        """Requests that finished, were rejected or timed out."""
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

    def written_rows(self) -> list[int]:
        """How often notes, gaps and aways have been full."""
        return [len(rows) for rows in self._written]

    def forget_rows(self, kept: list[int], before: Cluster) -> None:
        """Keep no more of them than were full before, and go on with the arrays of that time."""
        for rows, n in zip(self._written, kept, strict=True):
            del rows[n:]
        self.cluster = self.cluster._replace(notes=before.notes, gaps=before.gaps, aways=before.aways)

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
            self._lay_out_plans([self.table.derive(tuple(inputs[: INPUTS[kind]]))])
        elif wanted == WANT_PROGRAM:
            first = first_load(cluster)
            self._combinations.append(tuple(cluster.rows[first : first + arguments[0], 0].tolist()))
            self._lay_out_prices()
        elif wanted == WANT_TIMES:
            self._price_own(*arguments[:2])
        elif wanted == WANT_ROWS:
            for written, rows in zip(self._written, self._filled(), strict=True):
                written.append(rows)
            world["notes"] = world["gaps"] = world["aways"] = 0
            fresh = {name: np.zeros_like(getattr(cluster, name)) for name in ("notes", "gaps", "aways")}
            self.cluster = cluster._replace(**fresh)
        elif wanted == WANT_LOOK:
            self._look(arguments[0])

    def _price_own(self, tokens: int, logits: int) -> None:
        """Enter what the model's own layers and head take, here and around."""
        stages, most_tokens = len(self._clocks), len(self._own_s) - 1
        for stage, clock in enumerate(self._clocks):
            numbers, layers = clock.layers_around(tokens)
            end = min(numbers.stop, most_tokens + 1)
            rows = slice(numbers.start * stages + stage, end * stages, stages)
            self._own[rows] = layers.records[: end - numbers.start]
        numbers, layers = self.clock.layers_around(tokens)
        end = min(numbers.stop, most_tokens + 1)
        self._own_s[numbers.start : end] = layers.times_s[: end - numbers.start]
        for row in (0, 1, logits):
            if self._head[row]["known"]:
                continue
            numbers, heads = self.clock.heads_around(row)
            end = min(numbers.stop, len(self._head))
            self._head[numbers.start : end] = heads[: end - numbers.start]

    def _look(self, number: int) -> None:
        """Show what a replica has begun."""
        if self.timeline is None:
            raise RuntimeError("a replica is looked at, and nobody looks")
        cluster, replica, began_s = self.cluster, self.cluster.replicas[number], float(self.cluster.world["look_s"])
        if len(self._stages) > 1:
            self._look_at_stages(number, began_s)
            return
        sharing = replica["sharing"].copy()
        if replica["phase"] == RUNNING:
            sums, tokens = cluster.sums[number], int(replica["decoding_now"] * cluster.world["step_tokens"])
            used = np.flatnonzero(sums[:, 0, COUNT])
            loads, growth = ([self._load(s, sums[s, i]) for s in used.tolist()] for i in (0, 1))
            parts = cluster.parts[number][: replica["n_parts"]]
            steps = [(int(part["steps"]), float(part["first_s"]), float(part["slope_s"])) for part in parts]
            stall_s, guess_s = float(replica["run_stall_s"]), self._guess_s(int(replica["decoding_now"]), 0)
            span = Span(began_s, stall_s, steps, loads, growth, tokens, tokens, sharing, guess_s)
        else:
            loads, tokens, logits, guess_s = self.batch(number)
            steps = [(1, float(replica["wake_s"]) - began_s, 0.0)]
            stall_s = began_s - float(replica["began_s"])
            span = Span(began_s - stall_s, stall_s, steps, loads, [], tokens, logits, sharing, guess_s)
        self.timeline.begin(number, span)

    def _look_at_stages(self, number: int, began_s: float) -> None:
        timeline, cluster, replica = self.timeline, self.cluster, self.cluster.replicas[number]
        if timeline is None:
            return
        if replica["phase"] == RUNNING:
            stall_s = float(replica["run_stall_s"])
            timeline.begin(number, round_of(cluster, self._prices, self._structures, number, self._stages))
        else:
            stall_s, began_s = began_s - float(replica["began_s"]), float(replica["began_s"])
            timeline.end(number, began_s)
            for piece in pieces_of(cluster, self._structures, number, self._stages, self.clock.head_s):
                timeline.piece(number, piece)
        for stage in range(len(self._stages)):
            timeline.add(number, STALL, "waits for swaps", 0, began_s, began_s + stall_s, stage)

    # -- arrays --------------------------------------------------------------------------------------------------

    def _lay_out_plans(self, new: list[Piece]) -> None:
        for piece in new:
            if id(piece.structure) not in self._structure_index:
                self._structure_index[id(piece.structure)] = len(self._structures)
                self._structures.append(piece.structure)
            self._plan_arrays.add(piece, self._structure_index[id(piece.structure)])
        self.cluster = self.cluster._replace(plans=self._plan_arrays.plans(self.cluster.world))
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
        known = self._head, self._own, self._own_s
        self._prices = self.clock.prices(self._stages, self._structures, self._combinations, known)
