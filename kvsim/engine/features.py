"""What a simulation may have beyond the core of the loop, and the functions that only serve that.

A function of a feature that a simulation lacks is compiled as one that does nothing, so that a plain run waits for the
core alone. Interpreted, every function is what it says: where its feature is absent it is not called, or finds nothing.
"""

from collections.abc import Callable
from typing import TypeVar

FEATURES = ("caches", "handoff", "impatience", "pipeline", "sessions", "tenants")
Function = TypeVar("Function", bound=Callable[..., object])


def needs(feature: str, otherwise: float | tuple[float, ...] | None = None) -> Callable[[Function], Function]:
    """Mark a function that serves a feature; `otherwise` is what stands for its answer where there is none of it."""
    if feature not in FEATURES:
        raise ValueError(f"there is no feature {feature!r}; features: {', '.join(FEATURES)}")

    def mark(function: Function) -> Function:
        function.needs, function.otherwise = feature, otherwise  # type: ignore[attr-defined]
        return function

    return mark
