"""One request on its way through a replica."""

import math
from collections.abc import Sequence as Blocks

import numpy as np

from kvsim.derive import TIERS, Structure, Vector

NOTHING = np.zeros(len(TIERS), dtype=np.int64)


class Sequence:
    """Progress, timing and memory of one request.

    `target_tokens` are to be prefilled: the prompt, and after a preemption by recomputation the output so far as well.
    While it decodes, its amounts at decode iteration k of its replica are `start` + (k - `joined`) * `slope`.
    """

    __slots__ = (
        "admitted_s",
        "arrival_s",
        "blocks",
        "cached_tokens",
        "due",
        "finish_s",
        "first_token_s",
        "generated_at_join",
        "held",
        "index",
        "joined",
        "last_token_s",
        "loading",
        "output_tokens",
        "past_tokens",
        "preemptions",
        "prompt_tokens",
        "recomputed_tokens",
        "rejected",
        "slope",
        "start",
        "structure",
    )

    def __init__(
        self, index: int, arrival_s: float, prompt_tokens: int, output_tokens: int, blocks: Blocks[int] = ()
    ) -> None:
        self.index, self.arrival_s, self.blocks = index, arrival_s, blocks
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.past_tokens = self.cached_tokens = self.recomputed_tokens = self.preemptions = 0
        self.admitted_s = self.first_token_s = self.finish_s = self.last_token_s = math.nan
        self.loading = self.rejected = False
        self.held: Vector = NOTHING
        self.structure: Structure | None = None
        self.start = self.slope = NOTHING
        self.joined = self.generated_at_join = self.due = 0  # iterations of its replica, and a generated token

    @property
    def target_tokens(self) -> int:
        """Tokens that prefill has to process."""
        return self.prompt_tokens + self.recomputed_tokens

    def generated_tokens(self, iteration: int) -> int:
        """The generated token, counted from the end of what was prefilled, that decode iteration `iteration` feeds."""
        return self.generated_at_join + iteration - self.joined

    @property
    def last_generated_tokens(self) -> int:
        """The last generated token that is fed back: the one after it ends the request."""
        return self.output_tokens - self.recomputed_tokens - 1

    def amounts(self, iteration: int) -> Vector:
        """Its amounts in decode iteration `iteration`."""
        return self.start + (iteration - self.joined) * self.slope
