"""A first estimate of how many replicas a trace needs, from closed forms: no simulation.

Work is that of prompts, each priced by itself in chunks, and of output tokens in batches as large as memory lets them
be. Replicas are taken for one server of as many times the speed: a prompt waits for the work before it (Lindley's
recursion), and an output token is slowed by the prompts of its half minute.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvsim.iteration.clock import Clock, Load
from kvsim.planning.candidates import Family
from kvsim.planning.slo import Objective
from kvsim.plans.derive import PlanTable
from kvsim.plans.guessing import guesser_of
from traces import Trace

Floats = NDArray[np.float64]
_LENGTHS = 9  # at which prompts are priced; others lie between
_WINDOW_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A trace's work on one replica, in seconds by request: its prompt alone, its decoding alone and in a batch."""

    arrival_s: Floats
    prefill_s: Floats
    decode_alone_s: Floats  # of a token
    decode_s: Floats  # of a token, in a full batch: how long its step lasts
    batch: int
    output_tokens: NDArray[np.int64]

    @property
    def prefill_share(self) -> float:
        """Of all work, that of prompts."""
        prefill_s, decode_s = (
            float(self.prefill_s.sum()),
            float((self.decode_s * self.output_tokens).sum()) / self.batch,
        )
        return prefill_s / (prefill_s + decode_s)

    def floor_s(self, one: Objective) -> float:
        """What no number of replicas brings the objective's value below: nothing waits, and nothing is cached."""
        tokens = np.maximum(self.output_tokens - 1, 0)
        alone = {
            "ttft_s": self.prefill_s,
            "tpot_s": np.where(tokens > 0, self.decode_alone_s, np.nan),
            "e2e_s": self.prefill_s + tokens * self.decode_alone_s,
            "queue_s": np.zeros(len(tokens)),
        }
        return one.of(alone[one.latency])

    def value_s(self, one: Objective, replicas: int) -> float:
        """The objective's value on so many replicas, as estimated."""
        steps = self.decode_s * self.output_tokens / self.batch
        waits_s = _waits_s(self.arrival_s, (self.prefill_s + steps) / replicas)
        ttft_s = waits_s + self.prefill_s
        tpot_s = self.decode_s / (1 - np.minimum(self._busy(replicas), 0.99))
        tokens = np.maximum(self.output_tokens - 1, 0)
        values = {
            "ttft_s": ttft_s,
            "tpot_s": np.where(tokens > 0, tpot_s, np.nan),
            "e2e_s": ttft_s + tokens * tpot_s,
            "queue_s": waits_s,
        }
        return one.of(values[one.latency])

    def _busy(self, replicas: int) -> Floats:
        """The share of a replica's time that prompts take in each request's half minute."""
        window = ((self.arrival_s - self.arrival_s[0]) // _WINDOW_S).astype(np.int64)
        work_s = np.bincount(window, weights=self.prefill_s)
        return np.asarray(work_s[window] / (replicas * _WINDOW_S))


def work_of(family: Family, trace: Trace) -> Work:
    """A trace's work on a replica of a family; prefix caches are not looked at."""
    setup = family.setup
    guesser = guesser_of(setup)
    table, clock = (
        PlanTable(setup.policy, setup.rank, setup.machine(), setup.counts, guesser),
        Clock(setup.rank, setup.machine(), guesser),
    )
    prompts = trace.prompt_tokens
    lengths = np.unique(np.geomspace(prompts.min(), prompts.max(), _LENGTHS).astype(np.int64))
    prefill_s = [_prefill_s(table, clock, int(n), setup.max_num_batched_tokens) for n in lengths]
    contexts = prompts + trace.output_tokens // 2
    mean = int(contexts.mean())
    stored = table.decode(mean, 1).start[-3:].tolist()
    rooms = [room // need for room, need in zip(setup.capacity(), stored, strict=True) if need]
    batch = max(1, min([setup.max_num_seqs, 64, *rooms]))
    spread = np.unique(np.geomspace(max(1, contexts.min()), contexts.max(), _LENGTHS).astype(np.int64))
    alone_s = [_decode_s(table, clock, int(n), 1) for n in spread]
    step_s = _decode_s(table, clock, mean, batch)
    stages = setup.pp  # each has a part of the layers: a prompt's chunks are in all of them at a time
    return Work(
        arrival_s=trace.arrival_s,
        prefill_s=np.interp(prompts, lengths, prefill_s) / stages,
        decode_alone_s=np.interp(contexts, spread, alone_s),
        decode_s=np.full(len(trace), step_s),
        batch=batch,
        output_tokens=trace.output_tokens,
    )


def replicas_needed(work: Work, objectives: Sequence[Objective], most: int) -> int:
    """The fewest replicas that keep every objective as estimated; `most` where none does."""
    low, high = 0, 1
    while high < most and not keeps(work, objectives, high):
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(work, objectives, middle) else (middle, high)
    return high


def keeps(work: Work, objectives: Sequence[Objective], replicas: int) -> bool:
    """Whether so many replicas keep every objective, as estimated."""
    return all(work.value_s(one, replicas) <= one.limit_s for one in objectives)


def _waits_s(arrival_s: Floats, service_s: Floats) -> Floats:
    """How long each waits for the work before it (Lindley): the work so far above its lowest, less time gone by."""
    before = np.concatenate(([0.0], np.cumsum(service_s)[:-1])) - (arrival_s - arrival_s[0])
    return np.asarray(before - np.minimum.accumulate(np.minimum(before, 0.0)))


def _prefill_s(table: PlanTable, clock: Clock, tokens: int, most: int) -> float:
    """A prompt's prefill by itself, its first and last chunk standing for those between."""
    chunk = min(most, tokens)
    last_s = _chunk_s(table, clock, tokens, tokens - chunk, chunk)
    if chunk == tokens:
        return last_s
    return tokens / chunk * (_chunk_s(table, clock, tokens, 0, chunk) + last_s) / 2


def _chunk_s(table: PlanTable, clock: Clock, tokens: int, past: int, chunk: int) -> float:
    load = Load(*table.prefill(tokens, past, chunk))
    return clock.iteration([load], tokens=chunk, logits=int(past + chunk == tokens))[0]


def _decode_s(table: PlanTable, clock: Clock, context_tokens: int, batch: int) -> float:
    segment = table.decode(context_tokens, 1)
    load = Load(segment.piece.structure, segment.start * batch)
    return clock.iteration([load], tokens=batch, logits=batch)[0]
