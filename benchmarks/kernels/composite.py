"""Decode steps and prefills as sums of kernels: prices against measured times of the same kernels.

The matrices are those of the tables that are nearest to a layer of Llama-3.1-8B and, on eight GPUs, of Llama-3.1-70B;
norms and other elementwise kernels, which the tables lack, are left out of both sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from kernels.tables import Table

from kvsim.hardware.kernels.prices import Kernels


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One rank's matrices (n, k), heads and all-reduces of a layer; `up` are ways to cut the widest matrix."""

    name: str
    matrices: Sequence[tuple[int, int]]
    up: Sequence[Sequence[tuple[int, int]]]
    heads: int
    kv_heads: int
    hidden: int
    gpus: int


LAYERS = (
    Layer(
        name="8B", matrices=((6144, 4096), (4096, 4096), (4096, 12288)),
        up=(((12288, 4096), (16384, 4096)), ((10240, 4096), (10240, 4096), (8192, 4096)), ((7168, 4096),) * 4),
        heads=32, kv_heads=8, hidden=4096, gpus=1,
    ),
    Layer(
        name="70B, tp 8", matrices=((1536, 8192), (8192, 1024), (8192, 3584)), up=(((7168, 8192),),),
        heads=8, kv_heads=1, hidden=8192, gpus=8,
    ),
)  # fmt: skip
BATCHES, CONTEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1024, 2048, 4096, 8192, 16384)
DECODES = [(batch, context) for batch in BATCHES for context in CONTEXTS]
PREFILLS = (512, 1024, 2048, 4096, 8192)


def composites(measured: Sequence[Table], kernels: Kernels) -> list[dict[str, object]]:
    """Each step's priced and measured seconds of one layer, where the tables have (or enclose) all of its kernels."""
    tables = {table.kernel: table for table in measured if table.dtype == "bf16"}
    rows: list[dict[str, object]] = []
    for layer in LAYERS:
        heads = {"heads": layer.heads, "kv_heads": layer.kv_heads}
        steps = [(f"decode {b} x {n}", b, "decode_attention", {"batch": b, "context_tokens": n}) for b, n in DECODES]
        steps += [(f"prefill {n}", n, "prefill_attention", {"batch": 1, "tokens": n}) for n in PREFILLS]
        for name, m, attention, shape in steps:
            parts = [(attention, {**shape, **heads})]
            if layer.gpus > 1:
                parts += [("all_reduce", {"nbytes": 2 * m * layer.hidden, "gpus": layer.gpus})] * 2
            for up in layer.up:
                every = parts + [("gemm", {"m": m, "n": n, "k": k}) for n, k in (*layer.matrices, *up)]
                found = [between(tables[kernel], kernels, arguments) for kernel, arguments in every]
                if all(found):
                    priced_s, measured_s = (sum(times) for times in zip(*filter(None, found), strict=True))
                    rows.append({"model": layer.name, "step": name, "priced_s": priced_s, "measured_s": measured_s})
                    break
    return rows


def between(table: Table, kernels: Kernels, arguments: dict[str, int]) -> tuple[float, ...] | None:
    """Priced and measured time of a row, or both between the same two rows where the table lacks it.

    None beyond the table, and between rows more than a factor of 4 apart (all-reduce: 16, of which it has few).
    """
    along = {"gemm": "m", "decode_attention": "context_tokens", "prefill_attention": "tokens", "all_reduce": "nbytes"}
    sizes, wanted = table.columns[along[table.kernel]], arguments[along[table.kernel]]
    alike = np.logical_and.reduce([table.columns[n] == v for n, v in arguments.items() if n != along[table.kernel]])
    below, above = np.flatnonzero(alike & (sizes <= wanted)), np.flatnonzero(alike & (sizes >= wanted))
    if not len(below) or not len(above):
        return None
    low, high = below[sizes[below].argmax()], above[sizes[above].argmin()]
    if sizes[high] > (16 if table.kernel == "all_reduce" else 4) * sizes[low]:
        return None
    share = 0.0 if low == high else np.log(wanted / sizes[low]) / np.log(sizes[high] / sizes[low])
    price = getattr(kernels, f"{table.kernel}_s")
    priced = [price(**table.arguments(row)) for row in (low, high)]
    return tuple(float(a ** (1 - share) * b**share) for a, b in (priced, table.seconds[[low, high]]))
