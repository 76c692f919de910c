"""Reading and writing tables of requests: formats told from columns, round trips, and every kind of malformed input."""

import csv
import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import traces
from traces import Trace, TraceError

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
SUFFIXES = [".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet"]


def same_requests(left, right):
    for column in ("arrival_s", "prompt_tokens", "output_tokens", "session", "think_s", "block_ids", "block_offsets"):
        np.testing.assert_array_equal(getattr(left, column), getattr(right, column), strict=True)
    assert left.block_tokens == right.block_tokens
    assert [left.tenants[code] for code in left.tenant] == [right.tenants[code] for code in right.tenant]


@st.composite
def any_trace(draw):
    n = draw(st.integers(1, 5))

    def column(values):
        return draw(st.lists(values, min_size=n, max_size=n))

    block = draw(st.sampled_from([0, 1, 16, 512]))
    prompts = column(st.integers(1, 3000))
    counts = [p // block if block else 0 for p in prompts]
    ticks = draw(st.booleans())  # whole milliseconds are written in Mooncake's columns
    arrivals = column(st.integers(0, 10**9).map(lambda ms: ms / 1000) if ticks else st.floats(0, 1e7))
    return Trace.from_columns(
        name="any",
        arrival_s=sorted(arrivals),
        prompt_tokens=prompts,
        output_tokens=column(st.integers(1, 10**7)),
        tenant=column(st.integers(0, 2)),
        tenants=draw(st.sampled_from([("default", "b", "c"), ('a "quoted", one', "übung", "7")])),
        session=column(st.integers(-1, 2**31 - 1)),
        think_s=column(st.one_of(st.just(np.nan), st.floats(0, 1e6))),
        block_tokens=block,
        # Repeated to the size that is needed, which can be beyond the longest list that Hypothesis draws.
        block_ids=np.resize(draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50)), sum(counts)),
        block_counts=counts,
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=25, deadline=None)
@given(trace=any_trace())
def test_written_traces_read_back_the_same(tmp_path_factory, suffix, trace):
    path = tmp_path_factory.mktemp("round") / f"trace{suffix}"
    traces.write(trace, path)
    same_requests(traces.load(str(path)), trace)


@pytest.mark.parametrize("late_s", [1e7, 1.7e9, 1e300])
def test_late_requests_are_written_as_they_are(tmp_path, late_s):
    """Beyond what whole milliseconds can hold as well."""
    trace = Trace.from_columns(name="t", arrival_s=[0.0, late_s], prompt_tokens=[5, 6], output_tokens=[1, 1])
    traces.write(trace, tmp_path / "late.jsonl")
    same_requests(traces.load(str(tmp_path / "late.jsonl")), trace)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    trace, path = traces.load("azure-2023-code", limit=3), tmp_path / "t.csv"
    traces.write(trace, path)
    before = path.read_bytes()
    with pytest.raises(TraceError, match=r"t\.csv: exists already; choose another name, or say overwrite"):
        traces.write(trace, path)

    def full_disk(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(csv, "writer", full_disk)
    with pytest.raises(OSError, match="No space"):
        traces.write(trace.head(1), path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]
    monkeypatch.undo()
    traces.write(trace.head(1), path, overwrite=True)
    assert len(traces.load(str(path))) == 1


def test_unknown_endings_are_refused(tmp_path):
    trace = traces.load("azure-2023-code", limit=1)
    with pytest.raises(TraceError, match=r"t\.xlsx: unknown file type; use one of \.jsonl"):
        traces.write(trace, tmp_path / "t.xlsx")
    (tmp_path / "t.txt").write_text(HEADER)
    with pytest.raises(TraceError, match=r"t\.txt: unknown file type"):
        traces.load(str(tmp_path / "t.txt"))
    with pytest.raises(TraceError, match="unknown file type"):
        traces.load(str(tmp_path))


def test_plain_csv_with_tenants_and_sessions(tmp_path):
    path = tmp_path / "plain.csv"
    path.write_text(
        "\ufeffarrived_at,num_prefill_tokens,num_decode_tokens,tenant,session,pd_ratio\r\n"
        "5,100,10,chat,s1,1\r\n\r\n2.5,200,20,,,1\r\n7,300,30,chat,s1,1"
    )
    trace = traces.load(str(path))
    assert trace.arrival_s.tolist() == [2.5, 5.0, 7.0]
    assert trace.prompt_tokens.tolist() == [200, 100, 300]
    assert [trace.tenants[code] for code in trace.tenant] == ["default", "chat", "chat"]
    assert trace.session.tolist() == [-1, 0, 0]
    assert trace.notes == (
        "columns not read: pd_ratio",
        "1 requests arrived before the row above them: sorted by arrival",
    )


def test_nan_names_no_session_and_no_tenant(tmp_path):
    """Some tools write NaN where there is nothing: such rows have nothing in common."""
    rows = [{"arrived_at": i, "num_prefill_tokens": 5, "num_decode_tokens": 1} for i in range(3)]
    for row, name in zip(rows, (float("nan"), 3, float("nan")), strict=True):
        row |= {"session": name, "tenant": name}
    (tmp_path / "nan.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = traces.load(str(tmp_path / "nan.jsonl"))
    assert trace.session.tolist() == [-1, 3, -1]
    assert [trace.tenants[code] for code in trace.tenant] == ["default", "3", "default"]


def test_hash_ids_beyond_32_bits_are_renumbered_alike(tmp_path):
    path = tmp_path / "big.jsonl"
    rows = [{"timestamp": i, "input_length": 1024, "output_length": 1, "hash_ids": [2**62, 2**40 + i]} for i in (0, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = traces.load(str(path))
    assert trace.blocks(0)[0] == trace.blocks(1)[0]
    assert len(set(trace.block_ids.tolist())) == 3


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_hashes_of_64_bits_are_renumbered_alike(tmp_path, suffix):
    """Also those beyond 2^63, which a signed number cannot hold; a list in a CSV cell may have brackets."""
    shared, own = 2**64 - 1, [2**63, 5]
    rows = [
        {"timestamp": 1000 * i, "input_length": 1000, "output_length": 1, "hash_ids": [shared, n]}
        for i, n in enumerate(own)
    ]
    path = tmp_path / f"big.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "csv":
        with path.open("w") as stream:
            csv.writer(stream).writerows([rows[0], *(row.values() for row in rows)])
    else:
        ids = pa.array([row.pop("hash_ids") for row in rows], pa.list_(pa.uint64()))
        parquet.write_table(pa.Table.from_pylist(rows).append_column("hash_ids", ids), path)
    trace = traces.load(str(path))
    assert trace.blocks(0)[0] == trace.blocks(1)[0]
    assert len(set(trace.block_ids.tolist())) == 3


def test_azure_files_with_a_zone_and_unsorted_rows(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2024-05-10 00:00:01.5+00:00,10,1\r\n2024-05-10 00:00:00.0099300+00:00,20,2"
    )
    trace = traces.load(str(path))
    assert trace.arrival_s.tolist() == [0.0, 1.49007]
    assert trace.prompt_tokens.tolist() == [20, 10]


BAD_CSV = {
    "negative": ("-1,10,1", r"bad\.csv:3: arrived_at=-1: must be a finite number that is not negative"),
    "nan": ("nan,10,1", r"bad\.csv:3: arrived_at=nan: must be a finite"),
    "infinite": ("inf,10,1", r"bad\.csv:3: arrived_at=inf: must be a finite"),
    "huge": ("1e999,10,1", r"bad\.csv:3: arrived_at=1e999: must be a finite"),
    "text": ("soon,10,1", r"bad\.csv:3: arrived_at=soon: must be a finite"),
    "blank": (",10,1", r"bad\.csv:3: arrived_at=: must be a finite"),
    "fraction": ("1,10.5,1", r"bad\.csv:3: num_prefill_tokens=10\.5: must be a whole number from 1 to 10,000,000"),
    "zero prompt": ("1,0,1", r"bad\.csv:3: num_prefill_tokens=0: must be a whole number from 1 to 10,000,000"),
    "zero output": ("1,10,0", r"bad\.csv:3: num_decode_tokens=0: must be a whole number from 1 to 10,000,000"),
    "absurd prompt": (
        "1,1000000000000000,1",
        r"bad\.csv:3: num_prefill_tokens=1000000000000000: must be a whole number from 1",
    ),
    "beyond float": ("1,99999999999999999999,1", r"bad\.csv:3: num_prefill_tokens=9{20}: must be a whole"),
    "too few cells": ("1,10", r"bad\.csv:3: cells=2: must have the header's 3 cells"),
    "too many cells": ("1,10,1,1", r"bad\.csv:3: cells=4: must have the header's 3 cells"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_bad_csv_rows_are_named_or_skipped(tmp_path, kind):
    row, message = BAD_CSV[kind]
    path = tmp_path / "bad.csv"
    path.write_text(f"{HEADER}0,1,1\n{row}\n9,2,2\n")
    with pytest.raises(TraceError, match=message):
        traces.load(str(path))
    trace = traces.load(str(path), skip_bad_rows=True)
    assert trace.prompt_tokens.tolist() == [1, 2]
    assert trace.skipped_rows == 1


GOOD_JSON = '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}'
BAD_JSON = {
    "not json": ('{"timestamp": 1,', r"bad\.jsonl:3: row=.*must be a JSON object; Expecting"),
    "not an object": ("[1, 2]", r"bad\.jsonl:3: row=\[1, 2\]: must be a JSON object"),
    "deep": ("[" * 100_000, r"bad\.jsonl:3: row=\[\[\[.*must be a JSON object"),
    "missing": ('{"timestamp": 1, "output_length": 1, "hash_ids": []}', r"bad\.jsonl:3: input_length=None: must be"),
    "true": (GOOD_JSON.replace("600", "true"), r"input_length=True: must be a whole number"),
    "string": (GOOD_JSON.replace("600", '"600"'), r"input_length=600: must be a whole number"),
    "NaN": (GOOD_JSON.replace('"timestamp": 0', '"timestamp": NaN'), r"timestamp=nan: must be a finite"),
    "huge": (GOOD_JSON.replace("600", "1" + "0" * 400), r"input_length=10+.*: must be a whole number"),
    "ids short": (GOOD_JSON.replace("[1, 2]", "[]"), r"hash_ids=\[\]: must have one id for each 512-token block"),
    "ids long": (GOOD_JSON.replace("[1, 2]", "[1, 2, 3]"), r"hash_ids=\[1, 2, 3\]: must have one id for each"),
    "ids null": (GOOD_JSON.replace("[1, 2]", "null"), r"hash_ids=None: must be whole numbers"),
    "id negative": (GOOD_JSON.replace("[1, 2]", "[1, -2]"), r"hash_ids=\[1, -2\]: must be whole numbers"),
    "id fraction": (GOOD_JSON.replace("[1, 2]", "[1, 2.5]"), r"hash_ids=\[1, 2\.5\]: must be whole numbers"),
    "id beyond 64 bits": (GOOD_JSON.replace("[1, 2]", f"[1, {2**70}]"), r"hash_ids=\[1, \d+\]: must be whole numbers"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_rows_are_named_or_skipped(tmp_path, kind):
    row, message = BAD_JSON[kind]
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD_JSON}\n\n{row}\n")
    with pytest.raises(TraceError, match=message):
        traces.load(str(path))
    trace = traces.load(str(path), skip_bad_rows=True)
    assert trace.blocks(0).tolist() == [1, 2]
    assert (len(trace), trace.skipped_rows) == (1, 1)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (
            "arrived_at,num_prefill_tokens\n",
            "1,1\n",
            r"missing column num_decode_tokens; it has arrived_at, num_prefill",
        ),
        ("timestamp,input_length\n", "1,1\n", r"missing column output_length"),
        ("when,what\n", "1,1\n", r"it has what, when; a trace has arrived_at/num_prefill_tokens/num_decode_tokens or"),
        (HEADER.replace("num_decode_tokens", "arrived_at"), "1,1,1\n", r"header=arrived_at: column given twice"),
        (HEADER, "", r"empty trace: no rows were read"),
        ("", "", r"empty trace"),
        (HEADER, '1,1,"1\n', r"not CSV: unexpected end of data"),
        (HEADER.replace("\n", ",hash_ids\n"), "1,8,1,5\n", r"hash_ids without block_tokens; add that column"),
        (HEADER.replace("\n", ",think_s\n"), "1,8,1,-5\n", r"think_s=-5: must be a finite number"),
        (HEADER.replace("\n", ",block_tokens\n"), "1,8,1,8\n2,8,1,16\n", r":3: block_tokens=16: must be the same on"),
        (AZURE, "today,1,1\n", r":2: TIMESTAMP=today: must be a time written"),
        (AZURE, "2023-13-16 18:17:03,1,1\n", r":2: TIMESTAMP=2023-13-16 18:17:03: must be a time written"),
        (AZURE, "2023-11-16 18:17:03,-1,1\n", r":2: ContextTokens=-1: must be a whole number"),
    ],
)
def test_bad_csv_files_say_what_is_wrong(tmp_path, header, row, message):
    path = tmp_path / "bad.csv"
    path.write_text(header + row)
    with pytest.raises(TraceError, match=message):
        traces.load(str(path))


def test_nothing_but_bad_rows_is_an_empty_trace(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(HEADER + "1,0,1\n2,0,1\n")
    with pytest.raises(TraceError, match="empty trace: all 2 rows are bad"):
        traces.load(str(path), skip_bad_rows=True)


@pytest.mark.parametrize("skip", [False, True])
def test_damaged_files_are_refused(tmp_path, skip):
    whole = gzip.compress((HEADER + "1,10,1\n" * 500).encode())
    for name, content in {
        "cut.csv.gz": whole[:-20],
        "flipped.csv.gz": whole[:30] + bytes([whole[30] ^ 0xFF]) + whole[31:],
        "plain.csv.gz": HEADER.encode(),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TraceError, match=rf"{name}: truncated or damaged archive"):
            traces.load(str(tmp_path / name), skip_bad_rows=skip)
    (tmp_path / "zipped.csv").write_bytes(whole)
    with pytest.raises(TraceError, match=r"zipped\.csv: not UTF-8 text"):
        traces.load(str(tmp_path / "zipped.csv"), skip_bad_rows=skip)
    traces.write(traces.load("azure-2023-code", limit=50), tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-50])
    with pytest.raises(TraceError, match=r"cut\.parquet: not a whole Parquet file"):
        traces.load(str(tmp_path / "cut.parquet"), skip_bad_rows=skip)
