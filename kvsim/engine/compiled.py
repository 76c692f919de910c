"""The loop as machine code: the plain functions of this package compiled by numba for a simulation's features."""

import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
from numba.core import types
from numba.extending import overload

from kvsim.engine import loop
from kvsim.engine.by_reference import Reference, ReferenceType
from kvsim.engine.kept_code import is_kept, keep, kept
from kvsim.engine.state.layout import Layout

_KERNELS = (
    "batch.decoding",
    "batch.estimate",
    "batch.iterations",
    "batch.load",
    "batch.memory",
    "batch.neighbours",
    "batch.plans",
    "batch.preemption",
    "batch.pricing",
    "batch.runs",
    "batch.scheduling",
    "batch.settling",
    "books.causes",
    "books.replica",
    "caches.ages",
    "caches.eviction",
    "caches.held",
    "caches.index",
    "caches.links",
    "caches.prefix_cache",
    "caches.prompts",
    "caches.reuse",
    "caches.window",
    "handoff",
    "inbound",
    "loop",
    "pipeline",
    "requests.arrivals",
    "requests.patience",
    "requests.queues",
    "requests.routing",
    "requests.tenants",
    "sessions.between_turns",
    "speculation",
)
_PRICES = ("kvsim.hardware.machine", "kvsim.hardware.sharing", "kvsim.iteration.busy", "kvsim.iteration.price")
_PART: Any = {"_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


class Code:
    """`loop.play` as machine code, for simulations of two layouts and some features."""

    def __init__(self, cluster: Layout, prices: Layout, features: tuple[str, ...], folder: Path) -> None:
        self.cluster, self.prices = ReferenceType(cluster, features), ReferenceType(prices, features)
        self._signature = types.boolean(self.cluster, self.prices, types.int64, types.float64, types.int64)
        self.play: Any = numba.njit(_nrt=False)(loop.play)  # type: ignore[call-overload]  # an option without a type
        keep(self.play, folder)

    def load(self) -> bool:
        """Take what is kept on disk; whether there is any."""
        return kept(self.play, self._signature)

    def compile(self) -> bool:
        """Compile it, and keep it on disk; whether that could be."""
        _register()
        self.play.compile(self._signature)
        return is_kept(self.play)

    def references(self, cluster: Any, prices: Any) -> tuple[Reference, Reference]:
        """What `play` takes in place of these."""
        return Reference(cluster, self.cluster), Reference(prices, self.prices)


def _register() -> None:
    """Tell numba what calls of the loop's functions amount to, once."""
    while _left:
        for function in _functions(import_module(_left.pop())):
            overload(function, jit_options=_PART, strict=False)(_implementation(function))


_left = [*_PRICES, *(f"kvsim.engine.{name}" for name in _KERNELS)]


def _functions(module: ModuleType) -> list[Any]:
    return [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]


def _implementation(function: Any) -> Any:
    """What numba asks for the code of a call by the types of its arguments."""
    feature, otherwise = getattr(function, "needs", None), getattr(function, "otherwise", None)

    def nothing(*_arguments: Any) -> Any:
        return otherwise

    def implementation(*arguments: Any) -> Any:
        lacks = feature is not None and all(
            feature not in argument.features for argument in arguments if isinstance(argument, ReferenceType)
        )
        return nothing if lacks else function

    return implementation
