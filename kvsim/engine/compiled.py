"""The inner loop compiled: numba turns the plain functions of this package into machine code and keeps it on disk.

It is kept beside the sources, or in the user's cache where that folder cannot be written; `kvsim.engine.kept_code` sees
that a damaged or missing file costs no more than a compilation.
"""

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

import numba
from numba.extending import register_jitable

from kvsim.engine import loop
from kvsim.engine.kept_code import keep

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
_PRICES = ("kvsim.hardware.machine", "kvsim.iteration.busy", "kvsim.iteration.price")


def _functions(module: ModuleType) -> list[Any]:
    return [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]


for _name in (*_PRICES, *(f"kvsim.engine.{name}" for name in _KERNELS)):
    for _function in _functions(import_module(_name)):
        register_jitable(_nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)(_function)
play: Any = numba.njit(_nrt=False)(loop.play)  # type: ignore[call-overload]  # an option without a type
keep(play)
