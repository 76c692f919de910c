"""One policy priced on one machine, for as many sequences as a paper ran at a time."""

from collections.abc import Mapping

from kvsim.hardware.machine import Machine
from kvsim.iteration.clock import Clock, Load
from kvsim.iteration.timeline import operation_names
from kvsim.plans.derive import TIERS, PlanTable, Structure, Vector
from policies import ModelShape, parse_policy
from policies.plan import Tier


class Priced:
    """Times and bytes of `policy` on `model` and `machine`, the whole model on one GPU."""

    def __init__(
        self, policy: str, model: ModelShape, machine: Machine, shares: Mapping[str, float] | None = None
    ) -> None:
        self.model, self.machine = model, machine
        self.table = PlanTable(parse_policy(policy), model, machine, shares or {})
        self.clock = Clock(model, machine)

    def decode_s(self, prompt_tokens: int, batch: int = 1, generated_tokens: int = 1) -> float:
        """Seconds of one decode step of `batch` equal sequences."""
        segment = self.table.decode(prompt_tokens, generated_tokens)
        return self._iteration_s(segment.piece.structure, segment.start * batch, batch, batch)

    def prefill_s(self, prompt_tokens: int) -> float:
        """Seconds of a whole prompt in one step."""
        return self._iteration_s(*self.table.prefill(prompt_tokens, 0, prompt_tokens), prompt_tokens, 1)

    def decode_ops_s(self, prompt_tokens: int, batch: int = 1) -> dict[str, float]:
        """Seconds of each operation of the last layer's decode plan, alone on its lane."""
        segment = self.table.decode(prompt_tokens, 1)
        return self._ops_s(segment.piece.structure, segment.start * batch)

    def prefill_ops_s(self, prompt_tokens: int) -> dict[str, float]:
        """Seconds of each operation of the last layer's prefill plan, alone on its lane."""
        return self._ops_s(*self.table.prefill(prompt_tokens, 0, prompt_tokens))

    def stored_bytes(self, prompt_tokens: int, generated_tokens: int = 1) -> dict[Tier, int]:
        """Bytes that one decoding sequence keeps in each tier."""
        stored = self.table.decode(prompt_tokens, generated_tokens).start[-len(TIERS) :]
        return dict(zip(TIERS, stored.tolist(), strict=True))

    def largest_batch(self, prompt_tokens: int, generated_tokens: int, reserve_bytes: int) -> int:
        """Sequences that fit in HBM beside the weights and `reserve_bytes`."""
        room_bytes = self.machine.gpu.memory_bytes - self.model.weight_bytes - reserve_bytes
        return room_bytes // self.stored_bytes(prompt_tokens, generated_tokens)[Tier.HBM]

    def _iteration_s(self, structure: Structure, amounts: Vector, tokens: int, logits: int) -> float:
        return self.clock.iteration([Load(structure, amounts)], tokens=tokens, logits=logits)[0]

    def _ops_s(self, structure: Structure, amounts: Vector) -> dict[str, float]:
        work = self.clock.work([Load(structure, amounts)], tokens=1)
        names = operation_names(self.clock, [structure])
        last = structure.group_of[-1]
        first = len(names) - len(structure.ops) + sum(len(group) for group in structure.groups[:last])
        own = slice(first, first + len(structure.groups[last]))
        return dict(zip(names[own], work.seconds[own], strict=True))
