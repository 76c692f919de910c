"""The inner loop compiled: numba turns the plain functions of this package into machine code and keeps it on disk.

It is kept beside the sources, or in the user's cache where that folder cannot be written; `kvsim.kept_code` sees that
a damaged or missing file costs no more than a compilation.
"""

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

import numba
from numba.extending import register_jitable

from kvsim.engine import loop
from kvsim.kept_code import keep

_KERNELS = (
    "attribution",
    "batch",
    "books",
    "decoding",
    "estimate",
    "eviction",
    "handoff",
    "inbound",
    "iteration",
    "loop",
    "memory",
    "neighbours",
    "patience",
    "pipeline",
    "plans",
    "preemption",
    "prefix_cache",
    "prefix_held",
    "prefix_index",
    "prefix_links",
    "prefix_reuse",
    "prefix_window",
    "prefixes",
    "pricing",
    "queues",
    "routing",
    "runs",
    "scheduling",
    "sessions",
    "speculation",
    "settling",
    "tenants",
    "turns",
)


def _functions(module: ModuleType) -> list[Any]:
    return [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]


for _name in _KERNELS:
    for _function in _functions(import_module(f"kvsim.engine.{_name}")):
        register_jitable(_nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)(_function)
play: Any = numba.njit(_nrt=False)(loop.play)  # type: ignore[call-overload]  # an option without a type
keep(play)
