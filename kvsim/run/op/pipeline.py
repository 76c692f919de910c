"""The micro-batches of a pipeline in the `op` fidelity: each goes from stage to stage, as soon as it and a stage can.

Those of the next iteration set out before the one under way has ended: sequences that decode when their tokens are out,
chunks of prompts where the step fidelity lets them (`kvsim/engine/pipeline.py`). What the next iteration computes is
known unless somebody comes until it begins; then what has set out is given up, and all of it begins anew.
"""

from collections.abc import Sequence
from contextlib import suppress

import simpy

from kvsim.engine.desk import Engine
from kvsim.engine.micro_batches import MicroBatch
from kvsim.engine.rounds import next_round
from kvsim.engine.state.cluster import Record
from kvsim.run.op.links import Links
from kvsim.run.op.rank import Rank
from kvsim.run.op.transfers import Process
from kvsim.scenario.stages import Stages


class _Under:
    """An iteration under way: of each micro-batch when it has left the first stage and when it is out."""

    def __init__(self, parts: list[MicroBatch]) -> None:
        self.parts = parts
        self.left: list[simpy.Event] = []
        self.out: list[simpy.Event] = []
        self.out_s = [0.0] * len(parts)
        self.passing: list[simpy.Process] = []

    @property
    def emits(self) -> bool:
        """Whether tokens come out of it."""
        return any(part.logits for part in self.parts)


class Pipeline:
    """The stages of one replica."""

    def __init__(
        self, engine: Engine, number: int, stages: Stages, ranks: Sequence[Rank], links: Sequence[Links]
    ) -> None:
        self.env, self._network, self._engine, self._number = ranks[0].env, ranks[0].network, engine, number
        self._stages, self._ranks, self._links, self._hops = stages, ranks, links, stages.hops()
        self._free = [self.env.event().succeed() for _ in ranks]  # each stage of all that has set out
        self._ahead: tuple[_Under, list[simpy.Event]] | None = None  # and what was free before

    @property
    def _replica(self) -> Record:
        return self._engine.cluster.replicas[self._number]

    def execute(self) -> Process:
        """Run an iteration until its tokens are out or, where there are none, the first stage is free."""
        under = self._begin(self._engine.micro_batches(self._number))
        yield under.left[-1]
        if under.emits:
            self._look_ahead(under)
            yield self.env.all_of(under.out)
            for part, out_s in enumerate(under.out_s):
                self._replica["exit_s"][part] = out_s
        self._replica["round_end_s"] = self.env.now

    def _begin(self, parts: list[MicroBatch]) -> _Under:
        """What has set out already, if that is the same."""
        if self._ahead is not None:
            (under, before), self._ahead = self._ahead, None
            if len(parts) == len(under.parts) and all(map(MicroBatch.same, parts, under.parts)):
                for rank in self._ranks:
                    rank.show()
                return under
            for rank in self._ranks:  # nothing else is on any stage
                rank.abandon()
            for passing in under.passing:
                if passing.is_alive:
                    passing.interrupt()
            self._free = before
        return self._set_out(parts, [[] for _ in parts])

    def _look_ahead(self, under: _Under) -> None:
        """Let the next iteration set out behind one whose last micro-batch has left the first stage."""
        parts, follows = next_round(self._engine, self._number, self.env.now)
        decoded = any(part.decodes for part in under.parts)
        waits = []
        for number, part in enumerate(parts):
            before = [under.out[max(0, len(under.out) - len(parts) + number)]] if decoded and part.decodes else []
            end = (part.decodes and not decoded) or (part.prompt_tokens and not follows)
            waits.append([*under.out, *before] if end else before)
        if parts and not all(set(under.out) <= set(events) for events in waits):
            before_all = [*self._free]
            self._ahead = self._set_out(parts, waits), before_all

    def _set_out(self, parts: list[MicroBatch], waits: Sequence[Sequence[simpy.Event]]) -> _Under:
        under = _Under(parts)
        for number, part in enumerate(parts):
            free, left = self._free, [self.env.event() for _ in self._ranks]
            self._free = left
            under.left.append(left[0])
            under.out.append(left[-1])
            under.passing.append(self.env.process(self._pass(part, waits[number], free, left, under, number)))
        return under

    def _pass(
        self,
        part: MicroBatch,
        waits: Sequence[simpy.Event],
        free: Sequence[simpy.Event],
        left: Sequence[simpy.Event],
        under: _Under,
        number: int,
    ) -> Process:
        last = len(self._ranks) - 1
        with suppress(simpy.Interrupt):
            yield self.env.all_of(waits)
            for stage, rank in enumerate(self._ranks):
                if stage:
                    yield from self._send(stage, part.tokens)
                yield free[stage]
                rank.hides = self._ahead is not None and self._ahead[0] is under
                logits, guess_s = (part.logits, part.guess_s) if stage == last else (0, 0.0)
                yield from rank.execute(part.loads, part.tokens, logits, guess_s, None)
                if stage == last:
                    under.out_s[number] = self.env.now
                left[stage].succeed()

    def _send(self, stage: int, tokens: int) -> Process:
        """Bring the activations of so many tokens to a stage."""
        latency_s, rate_Bps = self._hops[stage - 1]
        uses = self._links[stage - 1].to(self._links[stage])
        sent = self._network.flow(float(self._stages.sent_bytes(tokens)), rate_Bps, uses)
        try:
            yield sent
        except simpy.Interrupt:
            self._network.stop(sent)
            raise
        yield self.env.timeout(latency_s)
