"""What every policy is: frozen hyper-parameters with pure functions that return plans."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from policies.model import ModelShape
from policies.plan import Buffer, Count, Plan, Step
from policies.shown import shown


class Reuse(StrEnum):
    """What a prefix cache may keep of a policy's state."""

    BLOCKS = "blocks"  # any leading run of blocks, as of a full cache
    PREFIX = "prefix"  # only the state of one whole prefix (an index or a decomposition spans it)
    NOTHING = "nothing"  # the state depends on the question or forgets the prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Base of all policies: subclass it as a frozen dataclass whose fields are the hyper-parameters.

    The functions describe one sequence on one layer; batches are sums. They see only layers of the `kinds` that the
    policy handles and prompts of at least `minimum_prompt_tokens`; elsewhere the drivers use the dense cache
    (`policies.resolve`).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    trained: ClassVar[str] = ""  # what must have been trained beside the model, if anything
    reuse: ClassVar[Reuse] = Reuse.NOTHING
    kinds: ClassVar[tuple[str, ...]] = ("full",)
    verifies: ClassVar[bool] = False  # whether `decode` plans steps of several new tokens, as verifying guesses takes
    by_shape: ClassVar[bool] = False  # whether layers of one shape have one plan, wherever they stand; not inherited

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """The shortest prompt for which the policy differs from the dense cache."""
        return 1

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """What is stored when `step` has run, at the least; the activations that the plan names come as views."""
        raise NotImplementedError

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """The layer's operations for a chunk of the prompt, and what is built when it completes the prompt."""
        raise NotImplementedError

    def prefill_end(self, model: ModelShape, step: Step) -> Plan:
        """Work on all layers at once, after the last layer of the chunk that completes the prompt."""
        return ()

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """The layer's operations for one generated token, or for several at once where the policy `verifies`."""
        raise NotImplementedError

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """The counts that this step's plan draws."""
        return ()


def at_least(policy: Policy, **minimum: int) -> None:
    """Raise ValueError naming the first integer parameter of `policy` that is below its minimum."""
    for field, low in minimum.items():
        value = getattr(policy, field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{policy.name}: {field}={shown(value)} is not a whole number")
        if value < low:
            raise ValueError(f"{policy.name}: {field}={value} must be at least {low}")


def share_of(policy: Policy, *fields: str) -> None:
    """Raise ValueError naming the first parameter of `policy` that is not a share in (0, 1]."""
    for field in fields:
        value = getattr(policy, field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"{policy.name}: {field}={shown(value)} must be above 0 and at most 1")


def one_of(policy: Policy, field: str, *allowed: str) -> None:
    """Raise ValueError when the parameter of `policy` is none of the allowed words."""
    value = getattr(policy, field)
    if value not in allowed:
        raise ValueError(f"{policy.name}: {field}={shown(value)} must be one of {', '.join(allowed)}")


def multiple_of(policy: Policy, field: str, divisor: str) -> None:
    """Raise ValueError with the two nearest values that would do, when one parameter does not divide the other."""
    value, unit = getattr(policy, field), getattr(policy, divisor)
    if value % unit:
        low = value // unit * unit
        near = f"{low} or {low + unit}" if low else f"{unit}"
        raise ValueError(f"{policy.name}: {field}={value} is not a multiple of {divisor}={unit}; use {near}")
