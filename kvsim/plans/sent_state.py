"""What of a sequence's state leaves with it when a prompt is processed on one replica and decoded on another."""

from collections import Counter
from collections.abc import Iterable

from kvsim.plans.derive import TIERS, Piece, Structure
from policies import ModelShape, Policy, Step, plan_layers
from policies.plan import Buffer
from policies.symbolic import Tape, polynomial_of

_NOTHING = Structure((), (), ())


class SentState:
    """Bytes of one rank that its prompt leaves behind for decoding, by the policy's own buffers.

    These are the buffers that the first decode step finds, by name and in the size that both it and the prompt's last
    step give them: staging, views and what only a prefill needs stay behind.
    """

    def __init__(self, policy: Policy, model: ModelShape) -> None:
        self._policy, self._model = policy, model
        self._pieces: list[Piece] = []
        self._known: dict[int, tuple[int, ...]] = {}

    def bytes_of(self, prompt_tokens: int) -> tuple[int, ...]:
        """Bytes per tier after a prompt of this length."""
        if prompt_tokens not in self._known:
            self._known[prompt_tokens] = self._evaluate(prompt_tokens)
        return self._known[prompt_tokens]

    def _evaluate(self, prompt_tokens: int) -> tuple[int, ...]:
        for position, piece in enumerate(self._pieces):
            rows = piece.rows(piece.variables((prompt_tokens,)))
            if piece.holds(rows):
                self._pieces.insert(0, self._pieces.pop(position))  # a prompt of nearly this length may come next
                return tuple(piece.vector(rows).tolist())
        self._pieces.insert(0, self._derive(prompt_tokens))
        return self._evaluate(prompt_tokens)

    def _derive(self, prompt_tokens: int) -> Piece:
        tape = Tape((prompt_tokens,))
        (prompt,) = tape.symbols()
        totals = dict.fromkeys(TIERS, 0)
        last = Step(prompt_tokens=prompt, past_tokens=0, new_tokens=prompt)
        ends = (plan_layers(self._policy, self._model, step) for step in (last, Step.decoding(prompt, 1)))
        pairs = [(before.buffers, after.buffers) for before, after in zip(*ends, strict=True)]
        same = Counter((id(before), id(after)) for before, after in pairs)  # layers that share their plans
        for before, after in {(id(before), id(after)): (before, after) for before, after in pairs}.values():
            layers, kept = same[id(before), id(after)], _kept(before)
            for name, buffer in _kept(after).items():
                if name in kept:
                    totals[buffer.tier] += layers * min(buffer.nbytes, kept[name].nbytes)
        columns = [polynomial_of(totals[tier]) for tier in TIERS]
        return Piece(_NOTHING, 1, tape.floors, tape.conditions, columns)


def _kept(buffers: Iterable[Buffer]) -> dict[str, Buffer]:
    return {b.name: b for b in buffers if not b.view and not b.ring}
