"""AIConfigurator's measured kernel tables as columns of numbers, with the rows that a datasheet rules out dropped."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow.parquet as pq

from kvsim.hardware.kernels.attention import attention_bytes, attention_flops
from kvsim.hardware.kernels.chip import Chip, element_bytes
from kvsim.hardware.kernels.experts import routed
from kvsim.hardware.kernels.gemm import gemm_bytes

GPUS = {"a100-80g-sxm": "a100_sxm", "h100-sxm": "h100_sxm", "b200": "b200_sxm", "l40s": "l40s"}
"""The catalogue's names and the tables'."""

DTYPES = {"bfloat16": "bf16", "int4_wo": "int4-g32", "w4a16_mxfp4": "mxfp4"}
SKEWS = {"balanced": 0.0, "power_law_1.01": 1.01, "power_law_1.2": 1.2}
UNGATED = {(2688, 1856), (1024, 2688), (2048, 5120)}
"""Experts of Nemotron models (hidden, intermediate), which have two matrices; vLLM 0.14 on the A100 ran three."""

Columns = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one kernel in one type: the arguments of its price, seconds, and which rows the fit may see.

    A shape is everything but the number of rows or tokens; all rows of a shape are seen, or none.
    """

    gpu: str
    kernel: str
    dtype: str
    columns: Columns
    seconds: np.ndarray
    seen: np.ndarray
    dropped: int  # rows quicker than the datasheet allows

    def part(self, rows: np.ndarray) -> "Table":
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Table(
            gpu=self.gpu, kernel=self.kernel, dtype=self.dtype, columns=columns, seconds=self.seconds[rows],
            seen=self.seen[rows], dropped=self.dropped,
        )  # fmt: skip

    def arguments(self, row: int) -> dict[str, Any]:
        """The price's keyword arguments for one row."""
        plain = {name: values[row].item() for name, values in self.columns.items() if name != "routed"}
        match self.kernel:
            case "gemm" | "moe":
                return {**plain, "dtype": self.dtype}
            case "all_reduce":
                return plain
        return {**plain, "head_dim": 128, "kv_dtype": self.dtype}


def tables(folder: Path, gpu: str, chip: Chip) -> list[Table]:
    """Every table of one GPU, a type each."""
    found = []
    for kernel, read in READERS.items():
        path = folder / f"{GPUS[gpu]}.{kernel}.parquet"
        if not path.exists():
            continue
        raw = {name: np.array(values) for name, values in pq.read_table(path).to_pydict().items()}
        for dtype, rows, columns, shape in read(raw, gpu):
            seconds = raw["latency_ms"][rows] * 1e-3
            kept = seconds >= floor_s(kernel, chip, dtype, columns)
            seen = np.array(
                [crc32(repr(one).encode()) % 3 > 0 for one in zip(*(s.tolist() for s in shape), strict=True)]
            )
            found.append(
                Table(
                    gpu=gpu, kernel=kernel, dtype=dtype, columns={n: c[kept] for n, c in columns.items()},
                    seconds=seconds[kept], seen=seen[kept], dropped=int((~kept).sum()),
                )
            )  # fmt: skip
    return found


def _gemm(raw: Columns, _: str):
    for name in np.unique(raw["gemm_dtype"]):
        rows = raw["gemm_dtype"] == name
        m, n, k = (raw[column][rows] for column in "mnk")
        yield DTYPES.get(str(name), str(name)), rows, {"m": m, "n": n, "k": k}, (n, k)


def _attention(raw: Columns, _: str):
    for name in np.unique(raw["kv_cache_dtype"]):
        rows = raw["kv_cache_dtype"] == name
        batch, heads, kv_heads = (raw[column][rows] for column in ("batch_size", "num_heads", "num_key_value_heads"))
        prefill = int(raw["step"].max()) == 0
        tokens = raw["isl"][rows] if prefill else raw["step"][rows] + 1
        columns = {"batch": batch, "tokens" if prefill else "context_tokens": tokens}
        yield (
            DTYPES.get(str(name), str(name)),
            rows,
            {**columns, "heads": heads, "kv_heads": kv_heads},
            (batch, heads, kv_heads),
        )


def _all_reduce(raw: Columns, _: str):
    rows = raw["backend"] == "vllm_graph"
    nbytes, gpus = 2 * raw["message_size"][rows], raw["num_gpus"][rows]
    yield "bf16", rows, {"nbytes": nbytes, "gpus": gpus}, (nbytes, gpus)


def _moe(raw: Columns, gpu: str):
    names = ("num_tokens", "hidden_size", "inter_size", "num_experts", "topk", "moe_tp_size", "moe_ep_size")
    for name in np.unique(raw["moe_dtype"]):
        if name == "w4a8_mxfp4_mxfp8" or (name == "w4a16_mxfp4" and gpu == "b200"):
            continue  # 8-bit activations are no type of the project; mxfp4 of 16 bits is not what a B200 multiplies
        rows = raw["moe_dtype"] == name
        values = [raw[column][rows] for column in names]
        keys = ("tokens", "hidden", "intermediate", "experts", "top_k", "tp", "ep")
        columns = dict(zip(keys, values, strict=True))
        columns["skew"] = np.array([SKEWS[one] for one in raw["distribution"][rows]])
        shapes = zip(values[1].tolist(), values[2].tolist(), strict=True)
        columns["gated"] = np.array([gpu == "a100-80g-sxm" or shape not in UNGATED for shape in shapes])
        columns["routed"] = _routed(columns)
        yield DTYPES.get(str(name), str(name)), rows, columns, values[1:]


READERS = {
    "gemm": _gemm,
    "prefill_attention": _attention,
    "decode_attention": _attention,
    "all_reduce": _all_reduce,
    "moe": _moe,
}


def _routed(columns: Columns) -> np.ndarray:
    """(rows, 3): rows of the busiest rank, experts that they touch and rows of the tiles that they fill."""
    names = ("tokens", "experts", "top_k", "ep", "skew")
    return np.array([routed(*one) for one in zip(*(columns[name].tolist() for name in names), strict=True)])


def floor_s(kernel: str, chip: Chip, dtype: str, columns: Columns) -> np.ndarray:
    """The least time that the datasheet allows each row."""
    c = columns
    if kernel == "gemm":
        product, peak_flops = chip.product(dtype)
        moved_s = gemm_bytes(dtype, product, c["m"], c["n"], c["k"]) / chip.hbm_Bps
        return np.maximum(moved_s, 2.0 * c["m"] * c["n"] * c["k"] / peak_flops)
    if kernel == "all_reduce":
        return c["nbytes"] / chip.nvlink_Bps
    if kernel == "moe":
        weights = c["routed"][:, 1] * np.where(c["gated"], 3, 2) * c["hidden"] * c["intermediate"] / c["tp"]
        return weights * element_bytes(dtype) / chip.hbm_Bps
    tokens, cached = (c["tokens"], 0) if kernel == "prefill_attention" else (1, c["context_tokens"] - 1)
    moved = attention_bytes(dtype, c["batch"], tokens, cached, c["heads"], c["kv_heads"], 128)
    return np.maximum(
        moved / chip.hbm_Bps, attention_flops(c["batch"], tokens, cached, c["heads"], 128) / chip.half_flops
    )
