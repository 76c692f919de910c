"""Several tokens per decode step: how many are guessed and verified at once, and how many of them hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvsim.models import load_model
from kvsim.text.names import unknown_name
from policies import POLICIES, ModelShape, Policy, leaves
from policies.shown import shown

HEADS = ("medusa", "hidden-transfer")  # guess with weights added to the model itself
LOOKUP = "lookup"  # guesses cost nothing: n-grams of the prompt
POSITION_UNITS = 1 << 20  # so that means of whole steps add up exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """A decode step verifies guesses of the next tokens beside the token that it feeds in (arXiv:2211.17192).

    `guesses` is how many tokens ahead it looks, `acceptance` the probability that a guess holds given that those
    before it did: one for all, or one for each. The step verifies `candidates` of them at once, more than `guesses`
    where they are a tree (arXiv:2401.10774), and `acceptance` is then that of the tree.

    `method` says who guesses: `draft`, a smaller model that runs once for each guess; `medusa`, one more head for each,
    of a residual layer and a vocabulary (arXiv:2401.10774); `hidden-transfer`, a projection for each, whose pseudo
    hidden states follow every candidate through the model (arXiv:2404.12022); `lookup`, for nothing. A draft model
    costs `draft_share` of what `draft` would.

    Raises ValueError for figures out of their ranges.
    """

    guesses: int
    acceptance: tuple[float, ...]
    candidates: int
    method: str
    draft: ModelShape | None = None
    draft_share: float = 1.0

    def __post_init__(self) -> None:
        if self.guesses < 1:
            raise ValueError(f"speculate={self.guesses} must be at least 1 token ahead")
        if len(self.acceptance) not in (1, self.guesses):
            raise ValueError(
                f"acceptance gives {len(self.acceptance)} probabilities for speculate={self.guesses}; "
                "give one for all guesses, or one for each"
            )
        for probability in self.acceptance:
            if not 0 <= probability <= 1:
                raise ValueError(f"acceptance={probability:g} must be a probability from 0 to 1")
        if self.candidates < self.guesses:
            raise ValueError(
                f"tree={self.candidates} candidates cannot reach speculate={self.guesses} tokens ahead; "
                f"use at least {self.guesses}"
            )
        if not 0 < self.draft_share <= 1:
            raise ValueError(f"draft_share={self.draft_share:g} must be above 0 and at most 1")

    @property
    def tokens_per_step(self) -> float:
        """The mean of tokens that a step emits: the guesses that hold, and the one that the model itself adds.

        With one acceptance a for k guesses it is (1 - a**(k + 1)) / (1 - a). To the nearest 2**-20.
        """
        mean, reached = 1.0, 1.0
        for probability in self._each:
            reached *= probability
            mean += reached
        return round(mean * POSITION_UNITS) / POSITION_UNITS

    @property
    def verified_tokens(self) -> int:
        """Tokens that run through the model in a step of one sequence."""
        tokens = self.candidates + 1
        return tokens * (self.guesses + 1) if self.method == "hidden-transfer" else tokens

    def head_params(self, target: ModelShape, tp: int) -> int:
        """Weights of one head, of those that guess with heads of the model's own; `target` is one of `tp` ranks."""
        square = -(-(target.hidden_dim**2) // tp)
        return square + (target.head_params if self.method == "medusa" else 0)

    def weight_bytes(self, target: ModelShape, tp: int) -> int:
        """What guessing adds to the weights of each of `tp` ranks, of which `target` is one."""
        if self.draft is not None:
            return round(self.draft_share * self.draft.shard(tp).weight_bytes)
        if self.method == LOOKUP:
            return 0
        return self.guesses * target.bytes_of(self.head_params(target, tp), target.outer_dtype)

    def described(self) -> dict[str, Any]:
        """As the `inputs` of a result say it."""
        return {
            "guesses": self.guesses,
            "acceptance": list(self.acceptance),
            "candidates": self.candidates,
            "method": self.method,
            "draft": None if self.draft is None else self.draft.name,
            "draft_share": self.draft_share,
            "tokens_per_step": self.tokens_per_step,
        }

    @property
    def _each(self) -> tuple[float, ...]:
        return self.acceptance * (self.guesses // len(self.acceptance))

    def check(self, policy: Policy) -> None:
        """Raise ValueError where a part of the policy does not say how it attends with several new tokens."""
        for leaf in leaves(policy):
            if not leaf.verifies:
                able = ", ".join(name for name, kind in POLICIES.items() if kind.verifies)
                raise ValueError(
                    f"{leaf.name} chooses keys for one new token at a time, and verifying guesses takes several; "
                    f"speculate works with {able}"
                )


def speculation(
    target: ModelShape,
    speculate: int | None,
    acceptance: Sequence[float],
    tree: int | None,
    draft: str | None,
    draft_share: float | None,
) -> Speculation | None:
    """What these options describe; None where nothing is guessed.

    Raises ValueError for options that do not go together and for an unknown draft; those that models raise.
    """
    given = {"acceptance": acceptance or None, "tree": tree, "draft": draft, "draft_share": draft_share}
    if speculate is None:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is of speculate, the number of tokens guessed in a step; give that too")
        return None
    if not acceptance:
        raise ValueError(f"speculate={speculate} needs acceptance: the probability that a guess holds, such as 0.7")
    if (draft is None) == (draft_share is None):
        raise ValueError(
            f"speculate={speculate} needs one of draft (a model, {', '.join((*HEADS, LOOKUP))}) and draft_share "
            "(what a run of the draft takes of one of the model)"
        )
    method, shape = _draft(draft, target)
    return Speculation(
        guesses=speculate,
        acceptance=tuple(acceptance),
        candidates=speculate if tree is None else tree,
        method=method,
        draft=shape,
        draft_share=1.0 if draft_share is None else draft_share,
    )


def _draft(name: str | None, target: ModelShape) -> tuple[str, ModelShape | None]:
    if name is None:
        return "draft", target
    if name in (*HEADS, LOOKUP):
        return name, None
    try:
        shape = load_model(name)
    except ValueError:
        near = unknown_name("draft", name, (*HEADS, LOOKUP))
        if "did you mean" in str(near):
            raise near from None
        raise
    if any(layer.experts for layer in shape.layers):
        raise ValueError(f"draft={name} routes experts, and a draft is priced as a dense model; choose one that is")
    return "draft", shape


def parse_acceptance(text: str) -> tuple[float, ...]:
    """Probabilities with commas between them, none in an empty text; raises ValueError for anything else."""
    if not text:
        return ()
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"acceptance={shown(text)} is not a probability such as 0.7, nor several such as 0.8,0.6,0.5")
    return values
