"""What measured times must be before a fit may use them: steady, repeatable and physical."""

import statistics
from collections.abc import Sequence

from kvsim.hardware.calibration.samples import Sample
from kvsim.hardware.kernels.prices import Kernels

BUSY = 0.1
"""Spread of repeats, or drift between passes, of a kernel's median shape beyond which a machine counts as busy."""

_SLACK = 0.98  # clocks and events are not exact
_PRICED = {
    "gemm": "gemm_s",
    "prefill_attention": "prefill_attention_s",
    "decode_attention": "decode_attention_s",
    "elementwise": "elementwise_s",
    "gather": "gather_s",
}


def steadiness(samples: Sequence[Sample]) -> list[tuple[str, float, float]]:
    """For each kernel (and type) the spread and the drift of its median shape, as shares."""
    found: dict[str, list[Sample]] = {}
    for one in samples:
        found.setdefault(f"{one.kernel} {one.dtype}".strip(), []).append(one)
    return [
        (name, statistics.median(one.spread for one in group), statistics.median(one.drift for one in group))
        for name, group in found.items()
    ]


def check_steady(samples: Sequence[Sample]) -> None:
    """Raise ValueError where repeats or passes differ as they do on a machine that has other work."""
    for name, spread, drift in steadiness(samples):
        if max(spread, drift) > BUSY:
            raise ValueError(
                f"this machine is busy: times of {name} spread by {max(spread, drift):.0%} where {BUSY:.0%} is the "
                "most; stop what else runs on it and calibrate again. Nothing was written"
            )


def check_physical(samples: Sequence[Sample], datasheet: Kernels, name: str) -> None:
    """Raise ValueError where a time is less than the datasheet of GPU `name` allows."""
    for one in samples:
        if one.kernel not in _PRICED:
            continue
        arguments: dict[str, int | str] = dict(one.arguments)
        if one.kernel == "gemm":
            arguments["dtype"] = one.dtype
        floor_s = float(getattr(datasheet, _PRICED[one.kernel])(**arguments))
        # Small operands stay in L2, which is quicker than the memory that the datasheet speaks of.
        if one.seconds < _SLACK * floor_s and floor_s > 2e-5:
            raise ValueError(
                f"{one.kernel} {dict(one.arguments)} took {one.seconds:.3g} s, less than the {floor_s:.3g} s that the "
                f"datasheet of {name} allows; name the GPU that this is with --gpu. Nothing was written"
            )
