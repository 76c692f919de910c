"""The loop as machine code: the plain functions of this package compiled by numba for a simulation's features."""

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

import numba
from numba.core import cpu, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import overload

from kvsim.engine import loop
from kvsim.engine.by_reference import ReferenceType
from kvsim.engine.state.layout import Layout

_KERNELS = (
    "batch.crowd",
    "batch.decoding",
    "batch.estimate",
    "batch.hops",
    "batch.iterations",
    "batch.load",
    "batch.meeting",
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
    _execute_nothing()
    function.compile(signature)
    code = function.overloads[signature.args]
    name: str = code.fndesc.llvm_func_name
    with global_compiler_lock:
        code.library.finalize()  # with all that it calls
    content: bytes = code.library.codegen._tm.emit_object(code.library._final_module)  # noqa: SLF001 - LLVM's own
    return name.encode() + b"\n" + content


def _execute_nothing() -> None:
    """Have numba emit no machine code for functions within others, nor load any: this process executes none.

    That took half of the time: each function is made ready to be called from Python before the next one is compiled.
    """
    context = cpu_target.target_context

    def named(library: Any, description: Any, environment: Any) -> Any:
        """What stands for a function in numba's tables; nobody calls it."""
        module, name = description.lookup_module(), description.qualname.split(".")[-1]
        return cpu._dynfunc.make_function(module, name, "", 1, environment, (library,))  # noqa: SLF001

    context.get_executable = named
    context.codegen()._add_module = lambda _module: None  # noqa: SLF001
    JITCodeLibrary._finalize_specific = lambda _library: None  # noqa: SLF001


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
