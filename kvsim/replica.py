"""One engine replica: continuous batching, chunked prefill, admission and preemption by the policy's own footprint.

Each pass of `run` is one iteration: schedule, charge, account. While nothing arrives or finishes, a run of pure decode
iterations is charged at once; a new request wakes it at the next iteration boundary.
"""

from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import simpy

from kvsim.decoding import DecodingBatch
from kvsim.derive import TIERS, PlanTable
from kvsim.ledger import Ledger
from kvsim.machine import Sharing
from kvsim.makespan import Clock, Load
from kvsim.neighbours import Neighbours
from kvsim.prefix_cache import PrefixCache
from kvsim.room import DDR, EMPTY, HBM, Limits, Room
from kvsim.runs import Floats, Run, price_run
from kvsim.sequence import NOTHING, Sequence

MAX_RUN = 4096  # iterations charged at once

Execute = Callable[[list[Load], int, int], Generator[simpy.Event, Any, None]]


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
        self.room = Room(table, limits)
        self.position = neighbours.join(self)
        self.waiting: deque[Sequence] = deque()
        self.swapped: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding = DecodingBatch(table)
        self.outstanding_tokens = 0  # prompt and output tokens of requests not finished, for the router
        self.left = 0  # requests that finished or were rejected
        self.held = NOTHING.copy()  # reserved by sequences in prefill, and by swapped ones in DDR
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
                self._note(self._used())
                self.neighbours.rest(self.position)
                self._wake = self.env.event()
                yield self._wake
                self.neighbours.work(self.position)
                self._note(self._used())

    @property
    def _sharing(self) -> Sharing:
        return self.clock.machine.sharing if self.execute else self.neighbours.sharing(self.position)

    def reprice(self) -> None:
        """End a run of iterations early because the use of the host has changed, where its times depend on that."""
        if self.execute is None and self.clock.uses_host([total.structure for total in self.decoding.totals.values()]):
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
        while self.swapped and budget > 0 and self._may_run() and self._swap_in(self.swapped[0]):
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
        need = self.room.prefill_bytes(target, past, chunk)
        if self.room.never_fits(sequence, need):
            self._reject(sequence)
            return 0
        if not self.room.fits(self._used(), need, self._margin_bytes()):
            return None
        if hit and self.cache:
            self.cache.accept(sequence.blocks, hit)
        sequence.held = need
        self.held += need
        self.prefilling.append(sequence)
        sequence.past_tokens = past
        if np.isnan(sequence.admitted_s):
            sequence.admitted_s, sequence.cached_tokens = self.env.now, past
        if hit and hit.load_bytes:
            ready_s = self.ledger.load_prefix(self.env.now, hit.load_bytes, self._sharing)
            sequence.loading = True
            self.env.timeout(ready_s - self.env.now).callbacks.append(lambda _: self._loaded(sequence))
            return 0
        return chunk

    def _loaded(self, sequence: Sequence) -> None:
        sequence.loading = False
        self.wake()

    def _reject(self, sequence: Sequence) -> None:
        sequence.rejected = True
        self._leave(sequence, finished=False)

    def _used(self) -> list[int]:
        """Bytes per tier that the next decode iteration holds."""
        return [a + b for a, b in zip(self.held.tolist(), self.decoding.stored_bytes(), strict=True)]

    def _margin_bytes(self) -> int:
        """HBM kept free at admission, unless nothing else runs."""
        return self.room.watermark_bytes if self.decoding or self.prefilling else 0

    # -- preemption ----------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Preempt the sequences that joined last until the next decode iteration fits."""
        while self.decoding and not self.room.fits(self._used()):
            victim = next(reversed(self.decoding.sequences.values()))
            generated = victim.generated_tokens(self.decoding.iteration)
            stored = victim.amounts(self.decoding.iteration)[-len(TIERS) :]
            self.decoding.remove(victim)
            if not self.room.fits(EMPTY, stored):
                self._reject(victim)
                continue
            victim.preemptions += 1
            victim.last_token_s = self.env.now
            parked = np.array([0, stored[HBM] + stored[DDR], 0], dtype=np.int64)
            if self.limits.preemption == "swap" and self.room.fits(self._used(), parked):
                victim.generated_at_join = generated
                victim.held = parked
                self.held += parked
                self.swapped.appendleft(victim)
                self._stall_s += self.ledger.swap(int(stored[HBM]), self._sharing, to_hbm=False)
            else:
                victim.recomputed_tokens += generated
                victim.past_tokens = 0
                self.waiting.appendleft(victim)

    def _swap_in(self, sequence: Sequence) -> bool:
        segment = self.table.decode(sequence.target_tokens, sequence.generated_at_join)
        stored = segment.start[-len(TIERS) :]
        if not self.room.fits(self._used(), stored - sequence.held, self._margin_bytes()):
            return False
        self.swapped.popleft()
        self.held -= sequence.held
        sequence.held = NOTHING
        self._stall_s += self.ledger.swap(int(stored[HBM]), self._sharing, to_hbm=True)
        self.decoding.join(sequence, sequence.generated_at_join)
        self._late.append(sequence)
        return True

    # -- iterations ----------------------------------------------------------------------------------------------

    def _iterate(self, chunks: list[tuple[Sequence, int]]) -> Generator[simpy.Event, Any, None]:
        """One iteration with these chunks of prompts beside all decoding sequences."""
        decoding, completed = len(self.decoding), []
        loads = self.decoding.loads()
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
        began, used = self.env.now, self._used()
        self._note(used)
        if self._stall_s:
            stall, self._stall_s = self._stall_s, 0.0
            yield self.env.timeout(stall)
        seconds, busy = self.clock.iteration(loads, tokens, logits, self._sharing)
        if self.execute is None:
            yield self.env.timeout(seconds)
        else:
            yield from self.execute(loads, tokens, logits)
        self.ledger.charge(loads, tokens, logits, busy)
        self._note(used)
        self._emit(Run.single(self.env.now - began), decoding, began)
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
                self.ledger.store_prefix(self.cache.store(sequence.blocks, sequence.prompt_tokens))
        else:
            self.ledger.gap(self.env.now - sequence.last_token_s)
        if sequence.last_generated_tokens == 0:
            self._leave(sequence, finished=True)
        else:
            self.decoding.join(sequence, 1)

    def _decode_run(self) -> Generator[simpy.Event, Any, None]:
        """Decode iterations until a sequence ends or changes, memory runs out, or a request wakes the replica."""
        steps = self.decoding.steps_until_change(MAX_RUN)
        used, growth = self._used(), self.decoding.growth_bytes()
        for tier in (HBM, DDR):
            if growth[tier] > 0:
                steps = min(steps, (self.limits.capacity[tier] - used[tier]) // growth[tier] + 1)
        decoding = len(self.decoding)
        began = self.env.now
        self._note(used)
        stall, self._stall_s = self._stall_s, 0.0
        sharing = self._sharing

        def price(step: int) -> tuple[float, Floats]:
            return self.clock.iteration(self.decoding.loads(step), decoding, decoding, sharing)

        run = price_run(price, steps, stall)
        self._wake = wake = self.env.event()
        yield self.env.timeout(run.seconds) | wake
        done = run.steps
        if wake.triggered and self.env.now < began + run.seconds:
            done = run.steps_by(self.env.now - began)
            run = run.head(done)
            if (rest := began + run.seconds - self.env.now) > 0:
                yield self.env.timeout(rest)
        self._wake = None
        self.ledger.charge_run(self.decoding.totals.values(), decoding, run)
        self._note([now + (done - 1) * more for now, more in zip(used, growth, strict=True)])
        self._emit(run, decoding, began)
        self._advance(done)

    def _advance(self, steps: int) -> None:
        """All decoding sequences have done `steps` iterations: those that are complete leave."""
        if self.decoding:
            for sequence in self.decoding.advance(steps):
                self._leave(sequence, finished=True)
