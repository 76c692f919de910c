"""One engine replica: continuous batching, chunked prefill, admission and preemption by the policy's own footprint.

Each pass of `run` is one iteration: schedule, charge, account. While nothing arrives or finishes, a run of pure decode
iterations is charged at once; a new request wakes it at the next iteration boundary.
"""

import heapq
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from kvsim.derive import TIERS, PlanTable, Structure, Vector
from kvsim.ledger import Ledger
from kvsim.machine import ALONE, Sharing
from kvsim.makespan import Clock, Floats, Load
from kvsim.neighbours import Neighbours
from kvsim.prefix_cache import PrefixCache
from kvsim.runs import Run, price_run
from kvsim.sequence import NOTHING, Sequence

HBM, DDR = 0, 1
WATERMARK = (
    0.01  # of HBM kept free at admission, so that a newcomer does not force a preemption at once (vLLM's figure)
)
MAX_RUN = 4096  # iterations charged at once

Execute = Callable[[list[Load], int, int], Generator[simpy.Event, Any, None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds an engine's batch: vLLM's knobs, and one rank's bytes for KV state in HBM and DDR."""

    max_num_seqs: int
    max_num_batched_tokens: int
    capacity: tuple[int, int, int]
    preemption: str  # "swap" or "recompute"


class Replica:
    """A group of tensor-parallel ranks that serve requests together; amounts are those of one rank."""

    def __init__(
        self,
        env: simpy.Environment,
        table: PlanTable,
        clock: Clock,
        limits: Limits,
        cache: PrefixCache | None,
        ledger: Ledger,
        neighbours: Neighbours,
        execute: Execute | None = None,
    ) -> None:
        self.env, self.table, self.clock, self.limits = env, table, clock, limits
        self.cache, self.ledger, self.neighbours, self.execute = cache, ledger, neighbours, execute
        self.position = neighbours.join(self)
        self.waiting: deque[Sequence] = deque()
        self.swapped: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding: dict[int, Sequence] = {}
        self.outstanding_tokens = 0  # prompt and output tokens of requests not finished, for the router
        self.left = 0  # requests that finished or were rejected
        self.iteration = 0  # decode iterations so far
        self.held = NOTHING.copy()  # reserved by sequences in prefill, and by swapped ones in DDR
        self._totals: dict[int, tuple[Structure, Vector, Vector, int]] = {}  # structure: amounts, slopes, sequences
        self._due: list[tuple[int, int, Sequence]] = []  # decode iterations at which a sequence ends or changes slope
        self._serial = 0  # breaks ties in `_due`
        self._late: list[Sequence] = []  # swapped in: their next token comes after a longer gap
        self._wake: simpy.Event | None = None
        self._stall_s = 0.0
        self.process = env.process(self.run())

    # -- requests come and go ------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Queue a request; a run of iterations is interrupted unless the request could not be served earlier anyway."""
        blocked = bool(self.waiting or self.swapped)
        self.waiting.append(sequence)
        self.outstanding_tokens += sequence.prompt_tokens + sequence.output_tokens
        if not blocked:
            self.wake()

    def wake(self) -> None:
        """End the current sleep or run of iterations at the next boundary."""
        if self._wake is not None and not self._wake.triggered:
            self._wake.succeed()

    def run(self) -> Generator[simpy.Event, Any, None]:
        """The engine's loop."""
        while True:
            self._make_room()
            chunks = self._schedule()
            if chunks or (self.execute is not None and self.decoding):
                yield from self._iterate(chunks)
            elif self.decoding:
                yield from self._decode_run()
            else:
                self.neighbours.rest(self.position)
                self._wake = self.env.event()
                yield self._wake
                self.neighbours.work(self.position)

    @property
    def _sharing(self) -> Sharing:
        return ALONE if self.execute else self.neighbours.sharing(self.position)

    def reprice(self) -> None:
        """End a run of iterations early because the use of the host has changed, where its times depend on that."""
        if self.execute is None and self.clock.uses_host([s for s, *_ in self._totals.values()]):
            self.wake()

    def _leave(self, sequence: Sequence, *, finished: bool) -> None:
        if finished:
            sequence.finish_s = self.env.now
        self.left += 1
        self.outstanding_tokens -= sequence.prompt_tokens + sequence.output_tokens

    # -- scheduling ----------------------------------------------------------------------------------------------

    def _schedule(self) -> list[tuple[Sequence, int]]:
        """The chunks of this iteration: running prefills first, then swapped and new requests as room allows."""
        budget = self.limits.max_num_batched_tokens - len(self.decoding)
        chunks: list[tuple[Sequence, int]] = []
        for sequence in self.prefilling:
            if budget > 0 and not sequence.loading:
                chunks.append((sequence, min(budget, sequence.target_tokens - sequence.past_tokens)))
                budget -= chunks[-1][1]
        while self.swapped and self._may_run() and self._swap_in(self.swapped[0]):
            budget -= 1
        while self.waiting and not self.swapped and budget > 0 and self._may_run():
            sequence = self.waiting[0]
            chunk = self._admit(sequence, budget)
            if chunk is None:
                break
            self.waiting.popleft()
            if chunk:
                chunks.append((sequence, chunk))
                budget -= chunk
        return chunks

    def _may_run(self) -> bool:
        return len(self.decoding) + len(self.prefilling) < self.limits.max_num_seqs

    def _admit(self, sequence: Sequence, budget: int) -> int | None:
        """Reserve what the prompt's prefill needs and return its first chunk; None when it has to wait."""
        target = sequence.target_tokens
        hit = self.cache.match(sequence.blocks, target) if self.cache and not sequence.recomputed_tokens else None
        past = hit.tokens if hit else 0
        chunk = min(budget, target - past)
        need = self._prefill_bytes(target, past, chunk)
        if self._never_fits(sequence, need):
            self._reject(sequence)
            return 0
        if not self._fits(self._used(), need, self._margin()):
            return None
        if hit and self.cache:
            self.cache.accept(sequence.blocks, hit)
        sequence.held = need
        self.held += need
        self.prefilling.append(sequence)
        sequence.past_tokens = sequence.cached_tokens = past
        if np.isnan(sequence.admitted_s):
            sequence.admitted_s = self.env.now
        if hit and hit.load_bytes:
            ready_s = self.ledger.load_prefix(self.env.now, hit.load_bytes, self._sharing)
            sequence.loading = True
            self.env.timeout(ready_s - self.env.now).callbacks.append(lambda _: self._loaded(sequence))
            return 0
        return chunk

    def _loaded(self, sequence: Sequence) -> None:
        sequence.loading = False
        self.wake()

    def _prefill_bytes(self, target: int, past: int, chunk: int) -> Vector:
        """The most that a prompt's prefill stores: at its end, whether one whole step or the last chunk reaches it."""
        if past or chunk < target:
            chunk = min(self.limits.max_num_batched_tokens, target - 1)
            past = target - chunk
        return self.table.prefill(target, past, chunk)[1][-len(TIERS) :]

    def _never_fits(self, sequence: Sequence, need: Vector) -> bool:
        """Whether a request alone exceeds the capacity, in prefill or at its last token.

        What prefill needs is looked at first: where eight times as much would fit and the output is no longer than the
        prompt, the last token is not examined. (One that outgrows the memory all the same is rejected then.)
        """
        if sequence.output_tokens <= sequence.target_tokens and self._fits([0, 0, 0], 8 * need):
            return False
        last = self.table.decode(sequence.target_tokens, max(1, sequence.last_generated_tokens))
        return not self._fits([0, 0, 0], np.maximum(need, last.start[-len(TIERS) :]))

    def _reject(self, sequence: Sequence) -> None:
        sequence.rejected = True
        self._leave(sequence, finished=False)

    def _used(self) -> list[int]:
        """Bytes per tier that the next decode iteration holds."""
        hbm, ddr, nvme = self.held.tolist()
        for _, amounts, _, _ in self._totals.values():
            stored = amounts[-len(TIERS) :].tolist()
            hbm, ddr, nvme = hbm + stored[0], ddr + stored[1], nvme + stored[2]
        return [hbm, ddr, nvme]

    def _fits(self, used: list[int], more: Vector = NOTHING, margin: int = 0) -> bool:
        """Whether `more` bytes fit beside those used, with a margin of HBM."""
        hbm, ddr, nvme = self.limits.capacity
        extra = more.tolist()
        return bool(used[0] + extra[0] + margin <= hbm and used[1] + extra[1] <= ddr and used[2] + extra[2] <= nvme)

    def _growth(self) -> list[int]:
        growth = NOTHING.copy()
        for _, _, slopes, _ in self._totals.values():
            growth += slopes[-len(TIERS) :]
        return growth.tolist()

    def _margin(self) -> int:
        """HBM kept free at admission, unless nothing else runs."""
        return int(WATERMARK * self.limits.capacity[HBM]) if self.decoding or self.prefilling else 0

    # -- preemption ----------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Preempt the sequences that joined last until the next decode iteration fits."""
        while self.decoding and not self._fits(self._used()):
            victim = next(reversed(self.decoding.values()))
            stored = victim.amounts(self.iteration)[-len(TIERS) :]
            self._remove(victim)
            if not self._fits([0, 0, 0], stored):
                self._reject(victim)
                continue
            victim.preemptions += 1
            victim.last_token_s = self.env.now
            victim.emitted_tokens = victim.recomputed_tokens + victim.generated_tokens(self.iteration)
            parked = np.array([0, stored[HBM] + stored[DDR], 0], dtype=np.int64)
            if self.limits.preemption == "swap" and self._fits(self._used(), parked):
                victim.generated_at_join = victim.generated_tokens(self.iteration)
                victim.held = parked
                self.held += parked
                self.swapped.append(victim)
                self._stall_s += self.ledger.swap(int(stored[HBM]), self._sharing, to_hbm=False)
            else:
                victim.recomputed_tokens = victim.emitted_tokens
                victim.past_tokens = 0
                self.waiting.appendleft(victim)

    def _swap_in(self, sequence: Sequence) -> bool:
        segment = self.table.decode(sequence.target_tokens, sequence.generated_at_join)
        stored = segment.start[-len(TIERS) :]
        if not self._fits(self._used(), stored - sequence.held, self._margin()):
            return False
        self.swapped.popleft()
        self.held -= sequence.held
        sequence.held = NOTHING
        self._stall_s += self.ledger.swap(int(stored[HBM]), self._sharing, to_hbm=True)
        self._join(sequence, sequence.generated_at_join)
        self._late.append(sequence)
        return True

    # -- the set of decoding sequences ---------------------------------------------------------------------------

    def _join(self, sequence: Sequence, generated: int) -> None:
        """Let a sequence decode from its generated token number `generated` on."""
        segment = self.table.decode(sequence.target_tokens, generated)
        sequence.structure = structure = segment.piece.structure
        sequence.start, sequence.slope = segment.start, segment.slope
        sequence.joined, sequence.generated_at_join = self.iteration, generated
        self.decoding[sequence.index] = sequence
        known = self._totals.get(id(structure))
        if known is None:
            self._totals[id(structure)] = (structure, segment.start.copy(), segment.slope.copy(), 1)
        else:
            _, amounts, slopes, count = known
            amounts += segment.start
            slopes += segment.slope
            self._totals[id(structure)] = (structure, amounts, slopes, count + 1)
        steps = min(segment.until, sequence.last_generated_tokens + 1) - generated
        self._serial += 1
        heapq.heappush(self._due, (self.iteration + steps, self._serial, sequence))

    def _remove(self, sequence: Sequence) -> None:
        del self.decoding[sequence.index]
        structure, amounts, slopes, count = self._totals[id(sequence.structure)]
        amounts -= sequence.amounts(self.iteration)
        slopes -= sequence.slope
        if count == 1:
            del self._totals[id(structure)]
        else:
            self._totals[id(structure)] = (structure, amounts, slopes, count - 1)

    def _advance(self, steps: int) -> None:
        """All decoding sequences have done `steps` iterations: end those that are complete, refresh changed slopes."""
        self.iteration += steps
        for _, amounts, slopes, _ in self._totals.values():
            np.add(amounts, steps * slopes, out=amounts)
        while self._due and self._due[0][0] <= self.iteration:
            due, _, sequence = heapq.heappop(self._due)
            if sequence.index not in self.decoding or due <= sequence.joined:
                continue  # preempted meanwhile
            generated = sequence.generated_tokens(self.iteration)
            if generated > sequence.last_generated_tokens:
                self._remove(sequence)
                self._leave(sequence, finished=True)
            elif due == self.iteration:
                self._remove(sequence)
                self._join(sequence, generated)

    # -- iterations ----------------------------------------------------------------------------------------------

    def _loads(self, steps: int = 0) -> list[Load]:
        totals = self._totals.values()
        return [Load(s, amounts + steps * slopes if steps else amounts) for s, amounts, slopes, _ in totals]

    def _iterate(self, chunks: list[tuple[Sequence, int]]) -> Generator[simpy.Event, Any, None]:
        """One iteration with these chunks of prompts beside all decoding sequences."""
        decoding, completed = len(self.decoding), []
        loads = self._loads()
        prefill: dict[int, Load] = {}
        for sequence, chunk in chunks:
            structure, amounts = self.table.prefill(sequence.target_tokens, sequence.past_tokens, chunk)
            load = prefill.get(id(structure))
            prefill[id(structure)] = Load(structure, amounts if load is None else load.amounts + amounts)
            if sequence.past_tokens + chunk == sequence.target_tokens:
                completed.append(sequence)
        loads += prefill.values()
        tokens, logits = decoding + sum(chunk for _, chunk in chunks), decoding + len(completed)
        self._wake = None
        began = self.env.now
        self._note(self._used())
        if self._stall_s:
            stall, self._stall_s = self._stall_s, 0.0
            yield self.env.timeout(stall)
        seconds, busy = self.clock.iteration(loads, tokens, logits, self._sharing)
        if self.execute is None:
            yield self.env.timeout(seconds)
        else:
            yield from self.execute(loads, tokens, logits)
        self.ledger.charge(loads, tokens, logits, busy)
        self._emit(Run.single(self.env.now - began), decoding, began)
        if decoding:
            self._advance(1)
        for sequence, chunk in chunks:
            sequence.past_tokens += chunk
        for sequence in completed:
            self._begin_decoding(sequence)

    def _note(self, used: list[int]) -> None:
        if self.cache:
            used = [a + b for a, b in zip(used, self.cache.held_bytes, strict=True)]
        running, waiting = len(self.decoding) + len(self.prefilling), len(self.waiting) + len(self.swapped)
        self.ledger.note(self.env.now, used, running, waiting)

    def _emit(self, run: Run, decoding: int, began_s: float) -> None:
        """Record the gaps before the tokens that these iterations emitted."""
        self.ledger.gaps(run, decoding)
        for sequence in self._late:
            first_s = run.stall_s + run.parts[0].first_s
            self.ledger.replace_gap(first_s, first_s + began_s - sequence.last_token_s)
        self._late.clear()

    def _begin_decoding(self, sequence: Sequence) -> None:
        self.prefilling.remove(sequence)
        self.held -= sequence.held
        sequence.held = NOTHING
        if not sequence.recomputed_tokens:
            sequence.first_token_s = self.env.now
            if self.cache:
                self.ledger.store_prefix(self.cache.store(sequence.blocks))
        else:
            self.ledger.gap(self.env.now - sequence.last_token_s)
        if sequence.last_generated_tokens == 0:
            self._leave(sequence, finished=True)
        else:
            self._join(sequence, 1)

    def _decode_run(self) -> Generator[simpy.Event, Any, None]:
        """Decode iterations until a sequence ends or changes, memory runs out, or a request wakes the replica."""
        steps = min(MAX_RUN, self._due[0][0] - self.iteration) if self._due else MAX_RUN
        used, growth = self._used(), self._growth()
        for tier in (HBM, DDR):
            if growth[tier] > 0:
                steps = min(steps, (self.limits.capacity[tier] - used[tier]) // growth[tier] + 1)
        decoding = len(self.decoding)
        began = self.env.now
        self._note(used)
        stall, self._stall_s = self._stall_s, 0.0
        sharing = self._sharing

        def price(step: int) -> tuple[float, Floats]:
            return self.clock.iteration(self._loads(step), decoding, decoding, sharing)

        run = price_run(price, max(1, steps), stall)
        self._wake = wake = self.env.event()
        yield self.env.timeout(run.seconds) | wake
        done = run.steps
        if wake.triggered and self.env.now < began + run.seconds:
            done = run.steps_by(self.env.now - began)
            run = run.head(done)
            if (rest := began + run.seconds - self.env.now) > 0:
                yield self.env.timeout(rest)
        self._wake = None
        self.ledger.charge_run(list(self._totals.values()), decoding, run)
        self._emit(run, decoding, began)
        self._advance(done)
        self._note(self._used())
