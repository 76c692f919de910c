"""Mutated traces of every format: tables, logs, benchmark results, spans, archives and Parquet, packed and not."""

import csv
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from fuzz import mutate
from fuzz.door import attempt_command
from pyarrow import parquet

SAMPLES = Path(__file__).parent.parent / "traces"
TABLES: tuple[list[dict[str, Any]], ...] = (
    [
        {"arrived_at": 0.0, "num_prefill_tokens": 40, "num_decode_tokens": 3, "tenant": "a", "session": 1},
        {"arrived_at": 1.5, "num_prefill_tokens": 9, "num_decode_tokens": 2, "tenant": "b", "session": 1},
    ],
    [
        {"arrived_at": 0, "num_prefill_tokens": 33, "num_decode_tokens": 3, "block_tokens": 16, "hash_ids": [1, 2]},
        {"arrived_at": 1, "num_prefill_tokens": 48, "num_decode_tokens": 2, "block_tokens": 16, "hash_ids": [1, 2, 3]},
    ],
    [
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 2]},
    ],
    [
        {"TIMESTAMP": "2023-11-16 18:15:46.6805900", "ContextTokens": 374, "GeneratedTokens": 44},
        {"TIMESTAMP": "2023-11-16 18:15:50.9951690", "ContextTokens": 396, "GeneratedTokens": 109},
    ],
    [
        {"chat_id": 0, "parent_chat_id": -1, "timestamp": 0.0, "input_length": 40, "output_length": 3, "type": "text",
         "turn": 1, "hash_ids": [1, 2, 3]},
        {"chat_id": 1, "parent_chat_id": 0, "timestamp": 2.5, "input_length": 50, "output_length": 3, "type": "text",
         "turn": 2, "hash_ids": [1, 2, 3, 4]},
    ],
    [
        {"Timestamp": 5, "Session ID": "s", "Elapsed time": 1.5, "Model": "GPT-4", "Request tokens": 472,
         "Response tokens": 18, "Total tokens": 490, "Log Type": "API log"},
    ],
)  # fmt: skip
RUN = {
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 2,
    "input_lens": [10, 20, 30],
    "output_lens": [1, 2, 3],
    "ttfts": [0.5, 1.0, 0.25],
    "itls": [[], [0.5], [0.25, 0.25]],
    "start_times": [1.0, 2.0, 3.0],
}
SESSION = {
    "id": "one",
    "block_size": 64,
    "requests": [
        {"t": 0.0, "type": "n", "model": "m", "in": 130, "out": 5, "hash_ids": [1, 2], "think_time": 1.5},
        {"t": 10.0, "type": "subagent", "requests": [
            {"t": 0.0, "type": "n", "model": "m", "in": 64, "out": 2, "hash_ids": [1], "think_time": None}]},
    ],
}  # fmt: skip
CLIENT = {
    "chunk-0-trace.csv": "0,0.5,1.2,Gamma,0.7,2.8\n600,0.25,1.0,Gamma,1.0,4.0\n1200,0,0,Gamma,0,0\n",
    "chunk-0-dataset.json": json.dumps({"0": {"input_tokens": "{100: 0.5, 300: 0.5}", "output_tokens": "{20: 1.0}"}}),
}
OPTIONS = ("spread_s=3", "run=1", "start=together", "session_rate_per_s=2", "span_s=60", "clients=0", "time_unit=s",
           "output=max_tokens", "chars_per_token=4", "block_tokens=16", "spread_s=nan", "span_s=1e300")  # fmt: skip


def attempt(rng: random.Random, folder: Path) -> str:
    """Write one mutated trace, then describe, convert, batch or simulate it."""
    name = rng.choice(_WAYS)(rng, folder)
    if rng.random() < 0.15:
        name += ":" + mutate.text_like(rng, rng.choice(OPTIONS)) if rng.random() < 0.5 else f":{rng.choice(OPTIONS)}"
    skip = ["--skip-bad-rows"] if rng.random() < 0.3 else []
    what = rng.random()
    if what < 0.6:
        return attempt_command(["trace", "info", name, *skip, *rng.choice(([], ["--json"], ["--lru", "1,10"]))], folder)
    if what < 0.85:
        out = f"out{rng.choice(('.csv', '.jsonl', '.jsonl.gz', '.parquet'))}"
        outcome = attempt_command(["trace", "convert", name, out, "--limit", "50", *skip], folder)
        if outcome == "read":  # what is written can be read
            again = attempt_command(["trace", "info", out], folder)
            assert again == "read", f"{out} of {name!a} cannot be read back"
        return outcome
    args = ["simulate", "--trace", name, "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--limit", "3", *skip]
    return attempt_command([*args, *rng.choice(([], ["--out", "out"], ["--json"]))], folder)


def _sample(rng: random.Random, folder: Path) -> str:
    """One of the small files that the tests of formats read, damaged in its text or its bytes."""
    sample = rng.choice(
        sorted(path for path in SAMPLES.glob("*/*") if path.suffix in (".log", ".jsonl", ".json", ".csv"))
    )
    content = sample.read_bytes()
    if rng.random() < 0.5:
        content = mutate.spliced(rng, content.decode()).encode(errors="surrogatepass")
    return _write(rng, folder, sample.name, content)


def _rows(rng: random.Random, folder: Path) -> str:
    rows = mutate.document(rng, rng.choice(TABLES))
    rows = rows if isinstance(rows, list) else [rows]
    kind = rng.choice(("jsonl", "json", "csv", "parquet"))
    if kind == "parquet":
        return _parquet(folder, rows)
    if kind == "csv":
        return _write(rng, folder, "t.csv", _csv(rows))
    return _write(rng, folder, f"t.{kind}", "\n".join(map(json.dumps, rows)).encode())


def _literal(rng: random.Random, folder: Path) -> str:
    rows, kind = rng.choice(TABLES), rng.choice(("jsonl", "csv"))
    text = _csv(rows).decode() if kind == "csv" else "\n".join(map(json.dumps, rows))
    return _write(rng, folder, f"t.{kind}", mutate.spliced(rng, text).encode(errors="surrogatepass"))


def _run(rng: random.Random, folder: Path) -> str:
    return _write(rng, folder, "bench.json", json.dumps(mutate.document(rng, RUN)).encode())


def _archive(rng: random.Random, folder: Path) -> str:
    members = dict(CLIENT)
    if rng.random() < 0.5:
        members = {"trace_1.json": json.dumps(mutate.document(rng, SESSION))}
    else:
        name = rng.choice(list(members))
        members[name] = (
            mutate.spliced(rng, members[name]) if rng.random() < 0.7 else mutate.text_like(rng, members[name])
        )
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, text in members.items():
            data = text.encode(errors="surrogatepass")
            header = tarfile.TarInfo(
                name if rng.random() < 0.9 else mutate.text_like(rng, name).encode(errors="replace").decode()
            )
            header.size = len(data)
            header.type = rng.choice((tarfile.REGTYPE,) * 9 + (tarfile.SYMTYPE, tarfile.DIRTYPE))
            archive.addfile(header, io.BytesIO(data) if header.isreg() else None)
    plain = content.getvalue() if rng.random() < 0.7 else mutate.damaged(rng, content.getvalue())
    suffix, pack = rng.choice((("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)))
    packed = pack(plain)
    (folder / f"t.tar{suffix}").write_bytes(packed if rng.random() < 0.8 else mutate.damaged(rng, packed))
    return f"t.tar{suffix}"


def _stored(rng: random.Random, folder: Path) -> str:
    """A Parquet file damaged in its bytes."""
    name = _parquet(folder, rng.choice(TABLES))
    (folder / name).write_bytes(mutate.damaged(rng, (folder / name).read_bytes()))
    return name


_WAYS: tuple[Callable[[random.Random, Path], str], ...] = (_sample, _rows, _rows, _literal, _run, _archive, _stored)


def _csv(rows: list[Any]) -> bytes:
    rows = [row if isinstance(row, dict) else {"": row} for row in rows]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(rows[0] if rows else [])
    for row in rows:
        writer.writerow([" ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row.values()])
    return text.getvalue().encode(errors="surrogatepass")


def _parquet(folder: Path, rows: list[Any]) -> str:
    rows = [row for row in rows if isinstance(row, dict)]
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(str(name) for row in rows for name in row):
        cells = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(cells)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):  # of types that no column holds together
            columns[name] = pa.array([ascii(cell) for cell in cells])
    columns = {name.encode(errors="replace").decode(): cells for name, cells in columns.items()}
    parquet.write_table(pa.table(columns), folder / "t.parquet")
    return "t.parquet"


def _write(rng: random.Random, folder: Path, name: str, content: bytes) -> str:
    if rng.random() < 0.3:
        content = mutate.damaged(rng, content)
    if rng.random() < 0.2 and name.endswith((".csv", ".jsonl", ".json", ".log")):
        name, content = f"{name}.gz", gzip.compress(content)
        content = mutate.damaged(rng, content) if rng.random() < 0.3 else content
    (folder / name).write_bytes(content)
    return name
