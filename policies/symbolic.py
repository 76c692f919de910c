"""Integers that remember how they were computed, so that a policy's plan is derived once and evaluated many times.

A plan is ordinary Python arithmetic on token counts. Run on `Symbol`s instead of ints, every row count becomes a
polynomial in the token counts and in the floors taken on the way, and every comparison that decided a branch becomes a
condition. Wherever the same conditions hold the same polynomials give the same plan, exactly. A value that leaves this
arithmetic (as a float, an index, a hash) is pinned: it becomes a condition that the expression equals it, which keeps
the result right and only makes it less general.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

Monomial = tuple[int, ...]  # indices of variables, sorted, with repetition; () is the constant
Polynomial = dict[Monomial, int]


class Floor(NamedTuple):
    """A variable that stands for `polynomial // divisor`."""

    polynomial: Polynomial
    divisor: int


class Condition(NamedTuple):
    """`polynomial < 0`, or `== 0` when `equal`, is `truth` wherever the derived plan holds."""

    polynomial: Polynomial
    equal: bool
    truth: bool

    def holds(self, values: Sequence[int]) -> bool:
        """Whether the condition is met when the variables have these values."""
        value = evaluate(self.polynomial, values)
        return (value == 0 if self.equal else value < 0) is self.truth


def evaluate(polynomial: Polynomial, values: Sequence[int]) -> int:
    """The value of a polynomial when its variables have these values."""
    total = 0
    for monomial, coefficient in polynomial.items():
        term = coefficient
        for index in monomial:
            term *= values[index]
        total += term
    return total


class Tape:
    """What one derivation records: its inputs, the floors that it took and the conditions that it relied on."""

    def __init__(self, inputs: Sequence[int]) -> None:
        self.inputs = len(inputs)
        self.values = list(inputs)
        self.floors: list[Floor] = []
        self.conditions: list[Condition] = []
        self._floor_of: dict[tuple[frozenset[tuple[Monomial, int]], int], int] = {}

    def symbols(self) -> tuple[int, ...]:
        """The inputs as symbols, to stand where plans expect ints."""
        return tuple(cast(int, Symbol(self, {(i,): 1})) for i in range(self.inputs))

    def floor(self, polynomial: Polynomial, divisor: int) -> Symbol:
        """The symbol for `polynomial // divisor`, the same one each time."""
        key = (frozenset(polynomial.items()), divisor)
        index = self._floor_of.get(key)
        if index is None:
            index = len(self.values)
            self.values.append(evaluate(polynomial, self.values) // divisor)
            self.floors.append(Floor(polynomial, divisor))
            self._floor_of[key] = index
        return Symbol(self, {(index,): 1})

    def decide(self, polynomial: Polynomial, equal: bool) -> bool:
        """The truth of a comparison, remembered as a condition when it depends on the inputs."""
        value = evaluate(polynomial, self.values)
        truth = value == 0 if equal else value < 0
        condition = Condition(polynomial, equal, truth)
        if any(polynomial) and condition not in self.conditions:
            self.conditions.append(condition)
        return truth


class Symbol:
    """A whole number of a derivation; `polynomial` says how it came about.

    It is no `int`, on purpose: arithmetic that mixes an int subclass with floats would bypass it unseen.
    """

    __slots__ = ("polynomial", "tape")

    def __init__(self, tape: Tape, polynomial: Polynomial) -> None:
        self.tape, self.polynomial = tape, polynomial

    def _pin(self) -> int:
        value = evaluate(self.polynomial, self.tape.values)
        self.tape.decide(total(self.polynomial, {(): value}, -1), equal=True)
        return value

    def __add__(self, other: Number) -> Number:
        if isinstance(other, float):
            return self._pin() + other
        return Symbol(self.tape, total(self.polynomial, polynomial_of(other), 1))

    __radd__ = __add__

    def __sub__(self, other: Number) -> Number:
        return self + -other

    def __rsub__(self, other: Number) -> Number:
        return -self + other

    def __neg__(self) -> Symbol:
        return Symbol(self.tape, {monomial: -k for monomial, k in self.polynomial.items()})

    def __mul__(self, other: Number) -> Number:
        if isinstance(other, float):
            return self._pin() * other
        product: Polynomial = {}
        for left, a in self.polynomial.items():
            for right, b in polynomial_of(other).items():
                monomial = tuple(sorted(left + right))
                product[monomial] = product.get(monomial, 0) + a * b
        return Symbol(self.tape, {m: k for m, k in product.items() if k})

    __rmul__ = __mul__

    def __floordiv__(self, other: Number) -> Number:
        if isinstance(other, float):
            return self._pin() // other
        if isinstance(other, Symbol):
            other = other._pin()
        if other == 0:
            raise ZeroDivisionError(f"a symbol of value {evaluate(self.polynomial, self.tape.values)} // 0")
        if other < 0:
            return (-self) // -other
        if all(k % other == 0 for k in self.polynomial.values()):
            return Symbol(self.tape, {m: k // other for m, k in self.polynomial.items()})
        return self.tape.floor(self.polynomial, other)

    def __rfloordiv__(self, other: float) -> float:
        return other // self._pin()

    def __mod__(self, other: Number) -> Number:
        return self - (self // other) * other

    def __rmod__(self, other: float) -> float:
        return other % self._pin()

    def __lt__(self, other: Number) -> bool:
        if isinstance(other, float):
            return self._pin() < other
        return self.tape.decide(total(self.polynomial, polynomial_of(other), -1), equal=False)

    def __ge__(self, other: Number) -> bool:
        return not self < other

    def __gt__(self, other: Number) -> bool:
        if isinstance(other, float):
            return self._pin() > other
        return self.tape.decide(total(polynomial_of(other), self.polynomial, -1), equal=False)

    def __le__(self, other: Number) -> bool:
        return not self > other

    def __eq__(self, other: object) -> bool:
        if isinstance(other, float):
            return self._pin() == other
        if not isinstance(other, int | Symbol):
            return NotImplemented
        return self.tape.decide(total(self.polynomial, polynomial_of(other), -1), equal=True)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return self != 0

    def __hash__(self) -> int:
        return hash(self._pin())

    def __int__(self) -> int:
        return self._pin()

    __index__ = __trunc__ = __round__ = __int__

    def __float__(self) -> float:
        return float(self._pin())

    def __truediv__(self, other: Number) -> float:
        return self._pin() / float(other)

    def __rtruediv__(self, other: float) -> float:
        return other / self._pin()


Number = int | float | Symbol


def polynomial_of(value: int | Symbol) -> Polynomial:
    """The polynomial of a symbol, or a plain number as a constant one."""
    if isinstance(value, Symbol):
        return value.polynomial
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number; token counts mix with int and float only")
    return {(): value} if value else {}


def total(left: Polynomial, right: Polynomial, sign: int = 1) -> Polynomial:
    """The sum of two polynomials, or their difference where `sign` is -1."""
    added = dict(left)
    for monomial, k in right.items():
        added[monomial] = added.get(monomial, 0) + sign * k
    return {m: k for m, k in added.items() if k}
