"""All-reduce between the GPUs of a host, as it runs inside a CUDA graph."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from kvsim.hardware.kernels.chip import Chip
from kvsim.hardware.kernels.shares import Count, Seconds, Share


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceFit:
    """Constants of all-reduce over NVLink, by the engine's own kernels up to a size and by NCCL from there on.

    The engine takes the quicker of one shot, in which every GPU reads the whole message of every other one, and of a
    reduce-scatter with an all-gather, which moves 2 (P - 1) / P of it, as NCCL does.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start_s: Seconds
    gpu_s: Seconds  # for each GPU that takes part
    one_shot: Share  # of NVLink's rate
    steps_s: Seconds  # of the two steps
    steps: Share
    library_bytes: Count  # the smallest message that NCCL takes
    library_s: Seconds
    library: Share

    def ways_s(self, chip: Chip, nbytes: int, gpus: int) -> tuple[float, float, float]:
        """Times of one shot, of two steps, and of NCCL."""
        start_s = self.start_s + gpus * self.gpu_s
        one_shot_s = start_s + (gpus - 1) * nbytes / (self.one_shot * chip.nvlink_Bps)
        sent_bytes = 2 * (gpus - 1) / gpus * nbytes
        steps_s = start_s + self.steps_s + sent_bytes / (self.steps * chip.nvlink_Bps)
        return one_shot_s, steps_s, self.library_s + sent_bytes / (self.library * chip.nvlink_Bps)

    def seconds(self, chip: Chip, nbytes: int, gpus: int) -> float:
        """Time until each of `gpus` GPUs has the sum of `nbytes` of each."""
        one_shot_s, steps_s, library_s = self.ways_s(chip, nbytes, gpus)
        return library_s if nbytes >= self.library_bytes else min(one_shot_s, steps_s)
