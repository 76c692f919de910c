"""Plans of decode steps, derived once and evaluated at each step: a plan's structure stays, its counts follow lengths.

`plan_layer` is ordinary arithmetic on token counts. Run on symbols (`policies.symbolic`) it gives the same plan with
polynomials for its numbers, and the conditions under which it is that plan. While they hold, a step's plan is those
polynomials at its token counts, the very integers that `plan_layer` would say; where one fails (a budget that
overflows, a block that closes), the plan has another structure and is derived anew.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

from policies import LayerPlan, ModelShape, Policy, Step, plan_layer
from policies.plan import Buffer, Copy, Count, Rows
from policies.symbolic import Condition, Floor, Polynomial, Symbol, Tape, evaluate

LOG = logging.getLogger(__name__)
PIECES = 8  # derivations that a layer keeps: InfLLM's steps that close a block alternate with others
KNOWN = 64  # derivations in which an equal one is looked for
COST_STEPS = 10  # a derivation costs at most so many plans, and must not be made more often than that


@dataclass(frozen=True, slots=True)
class _Number:
    """Stands in a derived plan for polynomial number `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class _Made:
    """Stands in a derived plan for an object with numbers inside: `kind(**parts)`, or a tuple of `parts`."""

    kind: type | None
    parts: tuple[tuple[str, Any], ...]


class Counted(NamedTuple):
    """What a step's plan says anew, of all that is executed: the rest of it is bound."""

    copies: tuple[tuple[Rows, int], ...]  # of each copy in turn its rows and the bytes of one
    rings: tuple[Buffer, ...]  # staging, which a step may see in another shape than the one before
    counts: tuple[Count, ...]


def counted(plan: LayerPlan) -> Counted:
    """What a plan says of its step alone."""
    row_bytes = {buffer.name: buffer.row_bytes for buffer in plan.buffers}
    return Counted(
        tuple((op.rows, row_bytes[op.src]) for op in plan.ops if isinstance(op, Copy)),
        tuple(buffer for buffer in plan.buffers if buffer.ring and not buffer.view),
        plan.counts,
    )


class Derived:
    """The plan of one layer wherever the conditions hold that it was derived under, for decode steps of one token."""

    def __init__(self, policy: Policy, model: ModelShape, step: Step, layer: int) -> None:
        tape = Tape((step.prompt_tokens, step.past_tokens))
        prompt, past = tape.symbols()
        plan = plan_layer(policy, model, Step(prompt_tokens=prompt, past_tokens=past, new_tokens=1), layer)
        self.policy = plan.policy
        self._executed: list[Polynomial] = []  # what `counted` takes, and then
        self._counted = _form(tuple(counted(plan)), self._executed)
        self._all = list(self._executed)  # what the whole plan takes
        self._plan = _form(tuple(plan[1:]), self._all)
        self._floors: list[Floor] = tape.floors
        self._conditions: list[Condition] = tape.conditions
        # Two layers whose derivations have the same content have the same plan at every step.
        self.content = (self.policy, self._plan, self._all, self._floors, self._conditions)
        self._last: tuple[int, int, Counted | None] = (-1, -1, None)  # replaced whole: threads may share it

    def at(self, step: Step) -> Counted | None:
        """What another step's plan says; None where it has another structure. The last answer is kept."""
        prompt, past, answer = self._last
        if (prompt, past) != (step.prompt_tokens, step.past_tokens):
            values = self._values(step)
            answer = None if values is None else Counted(*_filled(self._counted, _evaluated(self._executed, values)))
            self._last = (step.prompt_tokens, step.past_tokens, answer)
        return answer

    def plan(self, step: Step) -> LayerPlan | None:
        """The whole plan of another step; None where it has another structure."""
        values = self._values(step)
        return None if values is None else LayerPlan(self.policy, *_filled(self._plan, _evaluated(self._all, values)))

    def _values(self, step: Step) -> list[int] | None:
        """The token counts and the floors taken of them; None where a condition fails."""
        values = [step.prompt_tokens, step.past_tokens]
        for floor in self._floors:
            values.append(evaluate(floor.polynomial, values) // floor.divisor)
        return values if step.new_tokens == 1 and all(c.holds(values) for c in self._conditions) else None


def _form(value: Any, polynomials: list[Polynomial]) -> Any:
    """A part of a derived plan with stand-ins for what depends on token counts; what does not is kept as it is."""
    if isinstance(value, Symbol):
        return _number(value.polynomial, polynomials)
    if isinstance(value, tuple):
        parts = tuple(("", _form(part, polynomials)) for part in value)
        return _Made(None, parts) if _moves(parts) else tuple(part for _, part in parts)
    if is_dataclass(value) and not isinstance(value, type):
        parts = tuple((f.name, _form(getattr(value, f.name), polynomials)) for f in fields(value))
        return _Made(type(value), parts) if _moves(parts) else type(value)(**dict(parts))
    return value


def _number(polynomial: Polynomial, polynomials: list[Polynomial]) -> Any:
    if not any(polynomial):  # a constant
        return polynomial.get((), 0)
    if polynomial not in polynomials:
        polynomials.append(polynomial)
    return _Number(polynomials.index(polynomial))


def _evaluated(polynomials: Sequence[Polynomial], values: Sequence[int]) -> list[int]:
    return [evaluate(polynomial, values) for polynomial in polynomials]


def _moves(parts: Sequence[tuple[str, Any]]) -> bool:
    return any(isinstance(part, _Number | _Made) for _, part in parts)


def _filled(form: Any, numbers: Sequence[int]) -> Any:
    if isinstance(form, _Number):
        return numbers[form.index]
    if not isinstance(form, _Made):
        return form
    if form.kind is None:
        return tuple(_filled(part, numbers) for _, part in form.parts)
    return form.kind(**{name: _filled(part, numbers) for name, part in form.parts})


class LayerPlans:
    """The plans of one layer under one policy: each structure of its decode steps is derived when it is first met.

    Layers that derive the same share it, so that a step evaluates it once for all of them. Where a policy's arithmetic
    is not made for symbols, or deriving does not pay, every step is planned afresh, as a prompt's steps are.
    """

    def __init__(self, policy: Policy, model: ModelShape, layer: int, share: Callable[[Derived], Derived]) -> None:
        self._policy, self._model, self._layer, self._share = policy, model, layer, share
        self._pieces: tuple[Derived, ...] = ()
        self._derived = self._asked = 0
        self._derives = True

    def plan(self, step: Step) -> LayerPlan:
        """A step's plan, planned afresh."""
        return plan_layer(self._policy, self._model, step, self._layer)

    def piece(self, step: Step) -> Derived | None:
        """A derivation that holds for the step, the same one for as long as it does; None where there is to be none."""
        if step.prefilling or step.new_tokens != 1:
            return None
        self._asked += 1
        for piece in self._pieces:
            if piece.at(step) is not None:
                return piece
        if not self._derives or self._asked < COST_STEPS * (self._derived - PIECES):
            return None
        return self._derive(step)

    def _derive(self, step: Step) -> Derived | None:
        self._derived += 1
        try:
            piece = Derived(self._policy, self._model, step, self._layer)
            self._derives = piece.plan(step) == self.plan(step)
        except Exception as error:  # noqa: BLE001 - a policy from outside may do with token counts what only ints can
            self._derives = False
            LOG.info("%s is planned afresh at each step: %s: %s", self._policy.name, type(error).__name__, error)
        if not self._derives:
            return None
        piece = self._share(piece)
        self._pieces = (piece, *self._pieces)[:PIECES]
        return piece


class Plans:
    """The plans of all layers of a model, for every cache of one `offload`."""

    def __init__(self, model: ModelShape) -> None:
        self._model = model
        self._of: dict[tuple[Policy, int], LayerPlans] = {}
        self._known: list[Derived] = []
        self._lock = threading.Lock()  # caches may be used by threads of their own

    def of(self, policy: Policy, layer: int) -> LayerPlans:
        """The plans of a layer under the policy that its prompt has settled."""
        with self._lock:
            return self._of.setdefault((policy, layer), LayerPlans(policy, self._model, layer, self._shared))

    def _shared(self, piece: Derived) -> Derived:
        """An equal derivation of another layer, if there is one that is not long past."""
        with self._lock:
            known = next((known for known in self._known if known.content == piece.content), None)
            if known is None:
                self._known = [*self._known[-KNOWN:], piece]
            return known or piece
