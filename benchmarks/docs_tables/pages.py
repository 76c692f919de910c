"""Every page of docs/measured/ that this folder writes: by name, from the result of the same name."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import fidelities
from benchmarks.docs_tables import (
    aiconfigurator,
    attention_on_sms,
    batching,
    decode_overhead,
    parallelism,
    prefix_caches,
    session_kv,
    sparse_prefill,
    speculation,
    tenants,
)
from benchmarks.docs_tables.runs import ROOT

TABLES: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        attention_on_sms,
        batching,
        parallelism,
        prefix_caches,
        session_kv,
        sparse_prefill,
        speculation,
        tenants,
    )
}
PAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    **{name: module.page for name, module in TABLES.items()},
    "aiconfigurator": aiconfigurator.page,  # this and the next two measure by scripts of their own
    "decode_overhead": decode_overhead.page,
    "fidelities": fidelities.page,
}


def result_of(name: str) -> Path:
    """Where the figures of a page are kept."""
    return ROOT / "benchmarks" / "results" / f"{name}.json"


def page_of(name: str) -> Path:
    """The page."""
    return ROOT / "docs" / "measured" / f"{name}.md"
