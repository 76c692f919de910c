"""The loop as machine code: the plain functions of this package compiled by numba for a simulation's features."""

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

import numba
from numba.core import types
from numba.extending import overload

from kvsim.engine import loop
from kvsim.engine.by_reference import ReferenceType
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


def compiled(cluster: Layout, prices: Layout, features: tuple[str, ...]) -> bytes:
    """`loop.play` for simulations of two layouts and some features: what `MachineCode` takes."""
    _register()
    state = [ReferenceType(layout, features) for layout in (cluster, prices)]
    signature = types.boolean(*state, types.int64, types.float64, types.int64)
    function: Any = numba.njit(**_PART)(loop.play)
    function.compile(signature)
    code = function.overloads[signature.args]
    name: str = code.fndesc.llvm_func_name
    content: bytes = code.library._get_compiled_object()  # noqa: SLF001 - what numba's own cache keeps
    return name.encode() + b"\n" + content


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
