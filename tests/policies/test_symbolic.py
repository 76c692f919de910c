"""Symbols against plain ints: random arithmetic, and the plans of every policy derived once and evaluated elsewhere."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvsim.models import load_model
from policies import POLICIES, LayerPlan, Step, parse_policy, plan_layer
from policies.plan import Compute, Copy, Op, Rows
from policies.symbolic import Symbol, Tape, evaluate, polynomial_of

Program = Callable[[int, int], int]
LEAF = "leaf"


@st.composite
def programs(draw: st.DrawFn, depth: int = 3) -> Any:
    """Random expressions of two inputs, as nested tuples."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return (LEAF, draw(st.sampled_from(["x", "y"]) | st.integers(-9, 9)))
    name = draw(st.sampled_from(["+", "-", "*", "//", "%", "min", "max", "if<", "if<=", "if>", "if>=", "if==", "if!="]))
    if name in ("//", "%"):  # a plan divides by parameters
        return (name, draw(programs(depth=depth - 1)), (LEAF, draw(st.sampled_from([-7, -2, 1, 2, 3, 16, 100]))))
    arguments = 4 if name.startswith("if") else 2
    return (name, *(draw(programs(depth=depth - 1)) for _ in range(arguments)))


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "min": min,
    "max": max,
}
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "if<": operator.lt,
    "if<=": operator.le,
    "if>": operator.gt,
    "if>=": operator.ge,
    "if==": operator.eq,
    "if!=": operator.ne,
}


def run(program: Any, x: int, y: int) -> int:
    """The value of an expression; with symbols for x and y, what the tape records."""
    name, *arguments = program
    if name == LEAF:
        return {"x": x, "y": y}.get(arguments[0], arguments[0])
    left, right = run(arguments[0], x, y), run(arguments[1], x, y)
    if name in COMPARE:
        return run(arguments[2], x, y) if COMPARE[name](left, right) else run(arguments[3], x, y)
    value: int = BINARY[name](left, right)
    return value


def variables(tape: Tape, inputs: tuple[int, ...]) -> list[int] | None:
    """Inputs and floors at other inputs; None when a condition does not hold there."""
    values = list(inputs)
    for floor in tape.floors:
        values.append(evaluate(floor.polynomial, values) // floor.divisor)
    return values if all(condition.holds(values) for condition in tape.conditions) else None


INPUTS = st.integers(-50, 200)


@given(program=programs(), x=INPUTS, y=INPUTS)
@settings(max_examples=150)
def test_symbols_compute_what_ints_do(program: Any, x: int, y: int) -> None:
    tape = Tape((x, y))
    result = run(program, *tape.symbols())
    assert evaluate(polynomial_of(result), tape.values) == run(program, x, y)
    assert variables(tape, (x, y)) == tape.values  # where it was derived, all conditions hold


@given(program=programs(), here=st.tuples(INPUTS, INPUTS), there=st.tuples(INPUTS, INPUTS))
@settings(max_examples=150)
def test_what_was_recorded_holds_wherever_the_conditions_do(
    program: Any, here: tuple[int, int], there: tuple[int, int]
) -> None:
    tape = Tape(here)
    result = run(program, *tape.symbols())
    values = variables(tape, there)
    assume(values is not None)
    assert values is not None
    assert evaluate(polynomial_of(result), values) == run(program, *there)


@given(x=INPUTS, divisor=INPUTS)
def test_a_symbol_as_divisor_is_pinned(x: int, divisor: int) -> None:
    assume(divisor != 0)
    tape = Tape((x, divisor))
    left, right = tape.symbols()
    for symbolic, exact in ((left // right, x // divisor), (left % right, x % divisor), (x // right, x // divisor)):
        assert evaluate(polynomial_of(symbolic), tape.values) == exact
    assert variables(tape, (x + 1, divisor)) is not None or divisor == x + 1
    assert variables(tape, (x, divisor + 1)) is None


def test_division_by_zero_is_an_error_even_of_zero() -> None:
    (x,) = Tape((5,)).symbols()
    for value in (x, x - x, x * 2):
        with pytest.raises(ZeroDivisionError):
            value // 0


@pytest.mark.parametrize(
    "leave",
    [
        float,
        lambda x: x * 0.5,
        lambda x: 0.5 + x,
        lambda x: x - 0.5,
        lambda x: 0.5 - x,
        lambda x: x / 2,
        lambda x: 2 / x,
        lambda x: x // 2.0,
        lambda x: x % 2.5,
        lambda x: x < 7.5,
        lambda x: x == 7.0,
        lambda x: x >= 2.5,
        lambda x: x <= 2.5,
        int,
        round,
        operator.index,
        hash,
        lambda x: list(range(10))[x],
        lambda x: sum(range(x)),
        lambda x: {x: "here"}.get(7, "elsewhere"),
    ],
)
def test_a_value_that_leaves_the_arithmetic_is_right_and_pinned(leave: Callable[[Any], Any]) -> None:
    tape = Tape((7,))
    (x,) = tape.symbols()
    assert leave(x) == leave(7)
    assert variables(tape, (7,)) == [7]
    assert variables(tape, (8,)) is None
    assert variables(tape, (6,)) is None


def test_a_symbol_mixes_with_numbers_only() -> None:
    (x,) = Tape((7,)).symbols()
    with pytest.raises(TypeError, match="'3' is no whole number"):
        x + "3"  # type: ignore[operator]
    assert x != "7"


def test_equal_floors_are_one_variable_and_constants_no_condition() -> None:
    tape = Tape((100,))
    (x,) = tape.symbols()
    assert polynomial_of(x // 8 + (x + 1 - 1) // 8) == {(1,): 2}
    assert polynomial_of((8 * x + 16) // 8) == {(0,): 1, (): 2}  # divides evenly: no floor
    assert x - x == 0
    assert not tape.conditions
    assert len(tape.floors) == 1
    assert isinstance(x, Symbol)


VARIANTS = [
    *POLICIES,
    "offload-all:write_back=all",
    "snapkv:per=query_head",
    "quest:per=query_head",
    "infllm:window_tokens=1000,sink_tokens=3,block_tokens=64,execution_tokens=256,top_k=4",
    "squeezed-attention:levels=2,tier=ddr",
    "squeezed-attention:budget_tokens=512",
    "retrieval-attention:index=flat",
    "retrieval-attention:index=ivf",
    "full@heads=2+shadowkv@heads=6",
    "full@below=5000+quest",
]
LLAMA = load_model("llama-3.1-8b")


def numbers(plan: LayerPlan) -> list[int]:
    """Every number of a plan that may depend on token counts."""
    found: list[int] = []

    def take(rows: Rows) -> None:
        found.append(rows.fixed)
        found.extend(coefficient for _, coefficient in rows.counts)

    for buffer in plan.buffers:
        found += [buffer.rows, *buffer.row_shape, buffer.nbytes]
    for op in plan.ops:
        if isinstance(op, Copy | Compute):
            take(op.rows)
        if isinstance(op, Compute):
            found.append(op.flops_per_row)
            for access in (*op.reads, *op.writes):
                take(access.rows)
    for count in plan.counts:
        found += [count.maximum, count.expected()]
    return found


def wording(plan: LayerPlan) -> tuple[Any, ...]:
    """All of a plan but its numbers."""

    def of(op: Op) -> tuple[Any, ...]:
        ends = (op.src, op.dst, op.ids) if isinstance(op, Copy) else ()
        accesses = tuple(a.buffer for a in (*op.reads, *op.writes)) if isinstance(op, Compute) else ()
        return (type(op), op.name, op.after, ends, accesses)

    buffers = tuple((b.name, b.tier, b.dtype, bool(b.ring), b.view) for b in plan.buffers)
    return (plan.policy, buffers, tuple(of(op) for op in plan.ops), tuple(c.name for c in plan.counts))


class Derived:
    """A plan derived at one step: `inputs` are prompt and output tokens, or prompt, past and new tokens."""

    def __init__(self, text: str, inputs: tuple[int, ...]) -> None:
        self.text, self.inputs, self.tape = text, inputs, Tape(inputs)
        plan = planned(text, self.tape.symbols())
        self.wording = wording(plan)
        self.polynomials = [polynomial_of(n) for n in numbers(plan)]

    def check(self, inputs: tuple[int, ...]) -> None:
        """Where the conditions hold, the derived plan says what the direct one does, to the last number."""
        values = variables(self.tape, inputs)
        if values is None:
            assert inputs != self.inputs
            return
        direct = planned(self.text, inputs)
        assert self.wording == wording(direct)
        assert [evaluate(polynomial, values) for polynomial in self.polynomials] == numbers(direct)


def planned(text: str, inputs: tuple[int, ...]) -> LayerPlan:
    if len(inputs) == 2:
        step = Step.decoding(*inputs)
    else:
        prompt, past, new = inputs
        step = Step(prompt_tokens=prompt, past_tokens=past, new_tokens=new)
    return plan_layer(parse_policy(text), LLAMA, step, 5)


PROMPTS = st.integers(1, 20_000)
ANSWERS = st.integers(1, 2000)


@pytest.mark.parametrize("text", VARIANTS)
@given(here=PROMPTS, there=PROMPTS, now=ANSWERS, then=ANSWERS)
@settings(max_examples=12)
def test_decode_plans_derived_at_one_step_hold_at_others(text: str, here: int, there: int, now: int, then: int) -> None:
    derived = Derived(text, (here, now))
    for inputs in ((here, now), (here, then), (there, then)):
        derived.check(inputs)


@st.composite
def chunks(draw: st.DrawFn) -> tuple[int, int, int]:
    """Prompt, past and new tokens; often the whole prompt or its end."""
    prompt = draw(PROMPTS)
    past = draw(st.just(0) | st.integers(0, prompt - 1))
    return prompt, past, draw(st.just(prompt - past) | st.integers(1, prompt - past))


@pytest.mark.parametrize("text", VARIANTS)
@given(here=chunks(), there=chunks())
@settings(max_examples=12)
def test_prefill_plans_derived_at_one_step_hold_at_others(
    text: str, here: tuple[int, int, int], there: tuple[int, int, int]
) -> None:
    derived = Derived(text, here)
    for inputs in (here, there):
        derived.check(inputs)


@pytest.mark.parametrize("text", VARIANTS)
def test_one_derivation_covers_a_long_answer(text: str) -> None:
    """Few segments serve thousands of steps, which is what deriving is for."""
    tapes: list[Tape] = []
    for generated in range(1, 2001, 7):
        inputs = (12_000, generated)
        if not any(variables(tape, inputs) for tape in tapes):
            tapes.append(Tape(inputs))
            planned(text, tapes[-1].symbols())
    # InfLLM's steps in which a block closes differ from those in between; LoCoCo's first merge from later ones, and all
    # from the steps between merges; HiP's stages are due one, two or three at a time, or none; RetroInfer's exact rows
    # grow until they are clustered for the first time.
    assert len(tapes) <= {"lococo": 3, "retroinfer": 3, "hip": 4}.get(text, 2)
