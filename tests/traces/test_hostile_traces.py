"""Traces made to harm: bombs, links, pipes, forged headers and columns of odd types are refused in one line."""

import gzip
import io
import json
import lzma
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import traces
from traces import TraceError
from traces.agentic import Sessions
from traces.counts import Recording
from traces.files import UNPACKED_BYTES
from traces.npz import read_npz

HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
PACKED = Path(traces.__file__).parent / "data" / "agentic-coding" / "sessions.npz"


def refusal(path: Path) -> str:
    """The one line that loading this file raises, without its folder."""
    with pytest.raises(TraceError) as error:
        traces.load(str(path))
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize("row", [b"0,%060d,1\n" % 1, b"0"], ids=["rows", "one-cell"])
def test_a_gz_bomb(row: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bomb.csv.gz"
    path.write_bytes(gzip.compress(HEADER.encode() + row * (2 * UNPACKED_BYTES // len(row)), 9))
    assert "bytes, over 200 times its size, as a file does that is made to fill memory" in refusal(path)


def test_what_is_merely_large_is_read(tmp_path: Path) -> None:
    """Random bytes do not shrink as a bomb does: a file beyond the first bound is read whole."""
    path, text = tmp_path / "large.csv.gz", np.random.default_rng(0).bytes(5000).hex()
    rows = "".join(f"0,5,7,{number}{text}\n" for number in range(2000))
    assert len(rows) > UNPACKED_BYTES
    path.write_bytes(gzip.compress(HEADER.replace("\n", ",note\n").encode() + rows.encode(), 1))
    assert len(traces.load(str(path))) == 2000


def test_an_xz_bomb_of_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar.xz"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        header = tarfile.TarInfo("chunk-0-trace.csv")
        header.size = 2 * UNPACKED_BYTES
        archive.addfile(header, io.BytesIO(bytes(header.size)))
    path.write_bytes(lzma.compress(content.getvalue(), preset=1))
    assert "unpacks to more than" in refusal(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_link_or_device_in_an_archive(kind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "links.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("chunk-0-trace.csv")
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)
    assert refusal(path) == ("links.tar.gz/chunk-0-trace.csv: a link, device or sparse file; pack plain files alone")


def test_a_path_that_leads_out_of_an_archive_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "out.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("../../chunk-0-trace.csv")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"1,2,3"))
    refusal(path)
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["inner", "out.tar.gz"]


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"777777777777", b"-1         \x00"])
def test_a_forged_size_in_an_archive(size: bytes, tmp_path: Path) -> None:
    """Sizes below 0, and beyond the file: neither a circle nor a reservation of memory."""
    path = tmp_path / "forged.tar"
    entry = tarfile.TarInfo("chunk-0-trace.csv").tobuf()
    forged = bytearray(entry[:124] + size + entry[136:])
    forged[148:156] = b" " * 8
    forged[148:156] = f"{sum(forged[:512]):06o}\0 ".encode()
    path.write_bytes(bytes(forged) + bytes(2048))
    refusal(path)


@pytest.mark.parametrize("cut", [1, 9, 20])
@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress], ids=["gz", "xz"])
def test_a_packed_file_cut_short(pack: Callable[[bytes], bytes], cut: int, tmp_path: Path) -> None:
    content = pack((HEADER + "0,5,7\n" * 50).encode())
    name = "cut.csv.gz" if pack is gzip.compress else "cut.tar.xz"
    (tmp_path / name).write_bytes(content[:-cut])
    assert "truncated or damaged archive" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl.gz", "t.parquet", "t.npz", "t.tar.xz", "t.log", "t.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_regular_file(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    kind = "a pipe" if make is os.mkfifo else "a folder"
    assert f"{name} is {kind}, not a file; name a regular file" in refusal(tmp_path / name)


def test_a_device_without_end(tmp_path: Path) -> None:
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    assert "zero.csv is a device or socket, not a file" in refusal(tmp_path / "zero.csv")


REQUESTS = {"arrived_at": [0.0, 1.0], "num_prefill_tokens": [5, 6], "num_decode_tokens": [1, 2]}


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("num_prefill_tokens", pa.array([[1], [2]])),
        ("num_prefill_tokens", pa.array([{"a": 1}, {"a": 2}])),
        ("num_prefill_tokens", pa.array(["5", "6"]).dictionary_encode()),
        ("num_prefill_tokens", pa.array([b"\xff", b"6"])),
        ("num_prefill_tokens", pa.array([10**12, 2])),
        ("arrived_at", pa.array([0, 1], pa.timestamp("ns"))),
        ("arrived_at", pa.array([None, 1.0])),
        ("arrived_at", pa.array([float("nan"), 1.0])),
        ("tenant", pa.array([["a"], ["b"]])),
        ("tenant", pa.array(["x" * 1001, "b"])),
        ("session", pa.array([{"a": 1}, {"a": 2}])),
    ],
)
def test_a_parquet_column_of_another_type(column: str, cells: pa.Array, tmp_path: Path) -> None:
    parquet.write_table(pa.table({**REQUESTS, column: cells}), tmp_path / "t.parquet")
    assert column in refusal(tmp_path / "t.parquet")


def test_parquet_without_rows_or_with_too_many(tmp_path: Path) -> None:
    parquet.write_table(pa.table({name: pa.array([], pa.int64()) for name in REQUESTS}), tmp_path / "none.parquet")
    assert refusal(tmp_path / "none.parquet").startswith("none.parquet: empty trace: no rows")
    many = pa.table({name: np.ones(3_000_000, np.int64) for name in REQUESTS})
    parquet.write_table(many, tmp_path / "many.parquet", compression="zstd")
    assert refusal(tmp_path / "many.parquet").startswith("many.parquet: 3,000,000 rows in so small a file")


@pytest.mark.parametrize("tenant", ["\ud800", {"a": 1}, ["a"], "x" * 1001])
def test_a_tenant_that_no_file_can_hold(tenant: object, tmp_path: Path) -> None:
    row = {name: cells[0] for name, cells in REQUESTS.items()} | {"tenant": tenant}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert refusal(tmp_path / "t.jsonl").startswith("t.jsonl:1: tenant=")


def npy(shape: str, descr: str = "<i8", data: bytes = b"") -> bytes:
    """An array file with this header, whatever its data are."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(1000000000000, 6)"), r"array 'steps' of shape \(1000000000000, 6\) and dtype int64 needs other than"),
        (npy("(-1,)"), "array 'steps' of shape"),
        (npy("(1,)", "|O", bytes(8)), "array 'steps' is of dtype object, neither numbers nor text"),
        (npy("(1,)", "<M8[s]", bytes(8)), "neither numbers nor text"),
        (npy("(" * 4000), r"."),
        (npy("(True, 6)", data=bytes(48)), r"."),
        (npy("()", "|V0"), "neither numbers nor text"),
        (b"\x93NUMPY\x09\x00" + bytes(80), "unknown format"),
    ],
)
def test_a_forged_array(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("steps.npy", content)
    with pytest.raises(ValueError, match=message):
        read_npz(path)
    with pytest.raises(ValueError, match=r"t\.npz: not a recording of counts \("):
        Recording.load(path)
    assert refusal(path).startswith("t.npz: truncated archive, or not packed agentic sessions (")


def test_a_zip_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("steps.npy", "w") as stream:
        stream.write(npy("(50331648,)"))
        for _ in range(384):
            stream.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="unpacks to more than 268,435,456 bytes"):
        read_npz(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"run_length": lambda a: a * 0 + 2**30},
        {"prompt_tokens": lambda a: a * 0 + (2**31 - 1)},
        {"runs": lambda a: a + 1},
        {"session": lambda a: a + 10_000},
        {"session": lambda a: -a - 1},
        {"time_s": lambda a: a * np.nan},
        {"think_s": lambda a: a * 0 - 1},
        {"block_tokens": lambda a: a * 0},
        {"block_tokens": lambda a: np.array([64, 64])},
        {"model": lambda a: a.astype(np.float64)},
        {"runs": lambda a: a[:-1]},
        {"time_s": lambda a: a.reshape(-1, 1)},
    ],
)
def test_packed_sessions_that_do_not_fit_each_other(
    changes: dict[str, Callable[[np.ndarray], np.ndarray]], tmp_path: Path
) -> None:
    stored = read_npz(PACKED)
    np.savez(tmp_path / "t.npz", **stored | {name: change(stored[name]) for name, change in changes.items()})
    assert "not packed agentic sessions: " in refusal(tmp_path / "t.npz")
    assert Sessions.read(PACKED).fault() is None


def test_decimals_are_numbers_or_refused_by_name(tmp_path: Path) -> None:
    cells = pa.array([Decimal("5.0"), Decimal("6.0")])
    parquet.write_table(pa.table({**REQUESTS, "num_prefill_tokens": cells}), tmp_path / "t.parquet")
    assert refusal(tmp_path / "t.parquet").startswith("t.parquet:1: num_prefill_tokens=")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.jsonl", '{"arrived_at": ' + "9" * 5000 + "}\n", "a number has more than the 4,300 digits that are read"),
        ("t.jsonl", "[" * 200_000 + "\n", "it is nested too deep"),
        ("t.json", "null\n", "file=null: must be JSON objects"),
    ],
)
def test_json_that_python_refuses_in_words_of_its_own(name, content, says, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        traces.load(str(tmp_path / name))
