"""What bounds an engine's batch, and whether a request fits the memory of one rank: beside others, and at all."""

from collections.abc import Sequence as Amounts
from dataclasses import dataclass

import numpy as np

from kvsim.derive import TIERS, PlanTable, Vector
from kvsim.sequence import NOTHING, Sequence

HBM, DDR = 0, 1  # indices of amounts per tier
WATERMARK = 0.01  # of HBM kept free at admission, so that a newcomer does not force a preemption at once (as vLLM)
EMPTY = (0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """vLLM's knobs, and the bytes per tier (HBM, DDR, NVMe) that one rank has for KV state."""

    max_num_seqs: int
    max_num_batched_tokens: int
    capacity: tuple[int, int, int]
    preemption: str  # "swap" or "recompute"


class Room:
    """One rank's memory for KV state: what a prompt needs of it and what fits."""

    def __init__(self, table: PlanTable, limits: Limits) -> None:
        self.table = table
        self.capacity, self.chunk_tokens = limits.capacity, limits.max_num_batched_tokens
        self.watermark_bytes = int(WATERMARK * limits.capacity[HBM])

    def fits(self, used: Amounts[int], more: Vector = NOTHING, margin_bytes: int = 0) -> bool:
        """Whether `more` bytes per tier fit beside those used, with a margin of HBM."""
        hbm, ddr, nvme = self.capacity
        extra = more.tolist()
        return bool(
            used[0] + extra[0] + margin_bytes <= hbm and used[1] + extra[1] <= ddr and used[2] + extra[2] <= nvme
        )

    def prefill_bytes(self, target_tokens: int, past_tokens: int, new_tokens: int) -> Vector:
        """The most per tier that a prompt's prefill stores: at its end, reached by one step or by a last whole chunk.

        `past_tokens` and `new_tokens` are those of its first step.
        """
        if past_tokens or new_tokens < target_tokens:
            new_tokens = min(self.chunk_tokens, target_tokens - 1)
            past_tokens = target_tokens - new_tokens
        return self.table.prefill(target_tokens, past_tokens, new_tokens)[1][-len(TIERS) :]

    def never_fits(self, sequence: Sequence, prefill_bytes: Vector) -> bool:
        """Whether a request alone exceeds the capacity, in prefill or at its last token.

        Prefill is looked at first: where eight times as much would fit and the output is no longer than the prompt, the
        last token is not examined. (One that outgrows the memory all the same is rejected then.)
        """
        if sequence.output_tokens <= sequence.target_tokens and self.fits(EMPTY, 8 * prefill_bytes):
            return False
        last = self.table.decode(sequence.target_tokens, max(1, sequence.last_generated_tokens))
        return not self.fits(EMPTY, np.maximum(prefill_bytes, last.start[-len(TIERS) :]))
