"""Units of times and sizes of blocks: what is written is read, or asked for; never read as something else."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import traces
from kvsim.__main__ import main
from traces import TraceError
from traces.blocks import USUAL_TOKENS, block_tokens_of, either
from traces.units import UNITS_PER_S

SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def saved(tmp_path, rows):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "t.jsonl")


def mooncake(times, prompt=6000, **columns):
    return [{"timestamp": time, "input_length": prompt, "output_length": 5, **columns} for time in times]


def bailian(times):
    return [row | {"chat_id": i, "parent_chat_id": -1, "turn": 1} for i, row in enumerate(mooncake(times))]


def read(text):
    """The trace, or None and the words with which it is refused."""
    try:
        return traces.load(text), ""
    except TraceError as error:
        return None, str(error)


def found_block(prompt, counts, default=0):
    """The tokens of a block, or 0 and the words with which they are asked for."""
    try:
        return block_tokens_of(prompt, counts, source="t", default=default), ""
    except TraceError as error:
        return 0, str(error)


def with_ids(*lengths, size, tail=True):
    """Rows of these prompts a second apart, each with ids of its own for its blocks of so many tokens."""
    counts = [-(-n // size) if tail else n // size for n in lengths]
    firsts = np.cumsum([0, *counts]).tolist()
    return [
        {
            "timestamp": 1000 * i,
            "input_length": n,
            "output_length": 5,
            "hash_ids": [*range(firsts[i], firsts[i] + counts[i])],
        }
        for i, n in enumerate(lengths)
    ]


# -- times


@st.composite
def services(draw):
    """Seconds of requests that come at some rate, with a resolution of a millisecond."""
    n = draw(st.integers(1, 30))
    mean_ms = draw(st.sampled_from([20, 100, 300, 1000, 5000, 60_000]))
    gaps_ms = draw(st.lists(st.integers(0, 2 * mean_ms), min_size=n, max_size=n))
    return np.cumsum(gaps_ms).tolist()


def counted(times_ms, unit):
    """The times in a unit as a tool would write them: whole numbers, except of seconds."""
    return [t / 1000 if unit == "s" else t * (UNITS_PER_S[unit] // 1000) for t in times_ms]


@settings(max_examples=150, **SLOW)
@given(times_ms=services(), unit=st.sampled_from(["s", "ms", "ns"]))
def test_mooncakes_columns_in_any_unit(tmp_path, times_ms, unit):
    """Milliseconds are theirs; seconds are seen by their fractions and nanoseconds by their rate, and asked for.

    Two times tell no rate, and whole seconds are whole milliseconds of a thousand times the rate: those are left out.
    """
    values = counted(times_ms, unit)
    if unit != "ms":
        assume(len(values) > 2 and values[-1] > values[0])
    if unit == "s":
        assume(any(value % 1 for value in values))
    path = saved(tmp_path, mooncake(values))
    trace, refused = read(path)
    if trace is None:
        assert "time_unit=s" in refused
    else:
        np.testing.assert_allclose(trace.arrival_s, np.array(times_ms) / 1000, rtol=1e-12)
    stated = traces.load(path, time_unit=unit)
    np.testing.assert_allclose(stated.arrival_s, np.array(times_ms) / 1000, rtol=1e-12)


@settings(max_examples=100, **SLOW)
@given(times_ms=services())
def test_bailians_columns_are_in_seconds(tmp_path, times_ms):
    times_s = counted(times_ms, "s")
    trace, refused = read(saved(tmp_path, bailian(times_s)))
    if trace is None:  # a request in more than a hundred whole seconds
        assert "time_unit=ms" in refused
        assert all(value % 1 == 0 for value in times_s)
    else:
        np.testing.assert_allclose(trace.arrival_s, times_s, rtol=1e-12)


@pytest.mark.parametrize(
    ("rows", "arrival_s"),
    [
        (mooncake([0, 1000, 3052]), [0.0, 1.0, 3.052]),
        (mooncake([0.0, 1000.0]), [0.0, 1.0]),  # floats that are whole, as pandas writes them
        (mooncake([0, 0, 0]), [0.0, 0.0, 0.0]),
        (mooncake([0, 1]), [0.0, 0.001]),  # two times tell no rate
        (bailian([0, 4, 9]), [0.0, 4.0, 9.0]),
        (bailian([0.289, 406.906]), [0.289, 406.906]),
        (mooncake([10**9 * 1700 + t for t in (0, 500, 2000)]), [0.0, 0.5, 2.0]),  # of a clock since 1970
    ],
)
def test_times_that_are_certain(tmp_path, rows, arrival_s):
    assert traces.load(saved(tmp_path, rows)).arrival_s.tolist() == pytest.approx(arrival_s, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (mooncake([0.289, 0.54]), r"timestamp=0\.289: has a fraction: .*time_unit=s or time_unit=ms"),
        (mooncake([0, 1, 2, 3]), r"timestamp=3: is the last of 4: in milliseconds 1e\+03 requests/s; .*time_unit=s"),
        (mooncake([0, 10**9, 2 * 10**9]), r"in milliseconds 1e-06 requests/s; say the unit"),
        (mooncake([1_759_521_949, 1_759_521_950]), r"timestamp=1759521949: is the first time: too late"),
        (mooncake([1_759_521_949_000_000, 1_759_521_950_000_000]), r"is the first time: too late"),
        (mooncake([0, 1000, 2000], turn=1), r"timestamp=2000: stands beside turn, which traces in seconds have"),
        (mooncake([0, 1000, 2000], chat_id=1), r"stands beside chat_id, which traces in seconds have"),
        (bailian([0, 1_000_000, 2_000_000]), r"timestamp=2000000: .* in seconds 1e-06 requests/s; .*time_unit=ms"),
        ([{"timestamp": 0, "input_tokens": 5, "output_tokens": 5}], r"stands in no known format's columns"),
    ],
)
def test_times_that_could_be_of_two_units_are_asked_for(tmp_path, rows, message):
    with pytest.raises(TraceError, match=message):
        traces.load(saved(tmp_path, rows))
    assert len(traces.load(saved(tmp_path, rows), time_unit="us")) == len(rows)


# -- blocks


@settings(max_examples=300, **SLOW)
@given(
    size=st.sampled_from(USUAL_TOKENS),
    tail=st.booleans(),
    lengths=st.lists(st.integers(1, 4000), min_size=1, max_size=8),
    default=st.sampled_from([0, 512]),
)
def test_a_usual_block_is_found_or_asked_for(size, tail, lengths, default):
    """Whether a partial tail has an id or none; the format's own size stands where it fits as the format counts."""
    prompt = np.array(lengths)
    counts = -(-prompt // size) if tail else prompt // size
    fits_default = default and ((-(-prompt // default) == counts).all() or not counts.any())
    found, refused = found_block(prompt, counts, default)
    if found:
        assert found == size or (fits_default and found == default)
    else:
        assert "block_tokens=" in refused


@settings(max_examples=200, **SLOW)
@given(size=st.integers(1, 600), lengths=st.lists(st.integers(1, 4000), min_size=30, max_size=30))
def test_no_other_size_is_found_in_many_prompts(size, lengths):
    """Unless it fits every one of them as well, or leaves rows that are named as bad."""
    prompt = np.array(lengths)
    counts = -(-prompt // size)
    found, _ = found_block(prompt, counts)
    assert found in (0, size) or (-(-prompt // found) == counts).all() or not either(prompt, counts, found).all()


@settings(max_examples=100, **SLOW)
@given(
    size=st.sampled_from([16, 32, 64, 128, 256, 512]),
    lengths=st.lists(st.integers(1, 4000), min_size=1, max_size=6),
)
def test_blocks_of_a_file_are_read_or_asked_for(tmp_path, size, lengths):
    rows = with_ids(*lengths, size=size)
    path = saved(tmp_path, rows)
    trace, refused = read(path)
    if trace is None:
        assert "block_tokens=" in refused
    else:
        assert trace.block_tokens == size
    stated = traces.load(f"{path}:block_tokens={size}")
    assert (stated.block_tokens, stated.block_ids.tolist()) == (size, [i for row in rows for i in row["hash_ids"]])


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        (with_ids(640, 640, size=64), 64),
        (with_ids(6755, 7319, size=512), 512),
        (with_ids(600, size=512), 512),  # also floor(600 / 256), but Mooncake counts the tail
        (with_ids(100, 300, size=512, tail=False), 512),  # nobody has an id
        (with_ids(1000, 777, 3000, size=128, tail=False), 128),
        (with_ids(5000, 9000, size=2048), 2048),
        (with_ids(7, 9, size=1), 1),
    ],
)
def test_blocks_that_are_certain(tmp_path, rows, size):
    assert traces.load(saved(tmp_path, rows)).block_tokens == size


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (with_ids(60, size=64), r"the numbers of ids fit blocks of 32, 64, 128, 256, 512 tokens alike"),
        (with_ids(40, size=16, tail=False), r"blocks of 16, 32 tokens alike"),
        (with_ids(100, size=48), r"fit blocks of 32 tokens, and of others"),
    ],
)
def test_blocks_that_could_be_of_several_sizes_are_asked_for(tmp_path, rows, message):
    with pytest.raises(TraceError, match=message):
        traces.load(saved(tmp_path, rows))


def test_of_a_few_bad_rows_the_first_is_named_and_the_others_decide(tmp_path):
    rows = with_ids(640, 1000, 3000, size=64)
    del rows[1]["hash_ids"][-2:]
    path = saved(tmp_path, rows)
    with pytest.raises(TraceError, match=r":2: hash_ids=.*: must have one id for each 64-token block"):
        traces.load(path)
    trace = traces.load(path, skip_bad_rows=True)
    assert (trace.block_tokens, trace.skipped_rows) == (64, 1)


# -- turns


@pytest.mark.parametrize("size", [0, 64])
@settings(max_examples=60, **SLOW)
@given(data=st.data())
def test_turns_that_state_all_or_what_is_new_give_the_same_prompts(tmp_path, size, data):
    """One session of random messages and answers, written both ways; what is in doubt is asked for."""
    new = data.draw(st.lists(st.integers(1, 700), min_size=2, max_size=5))
    answers = data.draw(st.lists(st.integers(1, 300), min_size=len(new), max_size=len(new)))
    all_of_it = (np.cumsum(new) + np.cumsum([0, *answers[:-1]])).tolist()
    found = {}
    for kind, lengths in (("delta", new), ("whole", all_of_it)):
        rows = with_ids(*lengths, size=size or 64)
        for i, row in enumerate(rows):
            row |= {"session_id": "s", "output_length": answers[i]}
            if kind == "whole":  # a full block of the turn before is one of the next
                row["hash_ids"] = [
                    next((k for k in range(i) if lengths[k] >= 64 * (b + 1)), i) * 1000 + b
                    for b in range(-(-lengths[i] // 64))
                ]
            if not size:
                del row["hash_ids"]
        path = f"{saved(tmp_path, rows)}{':block_tokens=64' if size else ''}"
        trace, refused = read(path)
        if trace is None:
            assert "turns=whole or turns=delta" in refused
        elif len(new) > 2 or size:  # two lengths alone can grow by chance
            found[kind] = trace
        stated = traces.load(f"{path}{',' if size else ':'}turns={kind}")
        assert stated.prompt_tokens.tolist() == all_of_it
        for i in range(1, len(new) if size else 0):
            shared = all_of_it[i - 1] // 64
            assert stated.blocks(i)[:shared].tolist() == stated.blocks(i - 1)[:shared].tolist()
            assert not set(stated.blocks(i)[shared:].tolist()) & set(stated.blocks(i - 1).tolist())
    for trace in found.values() if size else ():
        assert trace.prompt_tokens.tolist() == all_of_it


# -- what commands say


def test_a_note_says_which_block_was_found(tmp_path, capsys):
    assert main(["trace", "info", saved(tmp_path, with_ids(640, 640, size=64))]) == 0
    assert "note: hash_ids are of 64 tokens: their numbers fit no other usual block" in capsys.readouterr().out


def test_a_column_of_ids_without_any_is_none(tmp_path):
    """Exporters write null where they have no hashes; beside ids a null is a bad row."""
    rows = mooncake([0, 1000], hash_ids=None)
    assert traces.load(saved(tmp_path, rows)).block_tokens == 0
    rows[0]["hash_ids"] = [*range(12)]
    with pytest.raises(TraceError, match=r":2: hash_ids=None: must be whole numbers"):
        traces.load(saved(tmp_path, rows))


@pytest.mark.parametrize("ids", [[], None])
def test_prompts_shorter_than_a_block(tmp_path, capsys, ids):
    """No id at all: a prefix cache that never hits, and no figure where there is none."""
    rows = mooncake([0, 1000], prompt=100) if ids is None else mooncake([0, 1000], prompt=100, hash_ids=ids)
    path = saved(tmp_path, rows)
    assert main(["trace", "info", path, "--lru", "10"]) == 0
    out = capsys.readouterr().out
    assert "no block ids" in out
    assert "infinite" not in out
    cached = ["simulate", "--trace", path, "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--prefix-cache-ddr", "1GiB"]
    assert main(cached) == (0 if ids is not None else 2)
    assert ("2 finished" in capsys.readouterr().out) == (ids is not None)


def test_a_unit_that_is_not_certain_ends_a_command_with_2(tmp_path, capsys):
    path = saved(tmp_path, mooncake([0.5, 1.5]))
    assert main(["trace", "info", path]) == 2
    assert "time_unit=s" in capsys.readouterr().err
    assert main(["trace", "info", f"{path}:time_unit=s"]) == 0
    assert "span            1 s" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".jsonl", ".csv.gz"])
def test_converted_traces_need_no_options(tmp_path, suffix):
    """Seconds of short prompts in small blocks: whatever had to be said once stands in the file that is written."""
    rows = [row | {"timestamp": i} for i, row in enumerate(with_ids(60, 64, 20, size=64))]
    out = tmp_path / f"out{suffix}"
    source = f"{saved(tmp_path, rows)}:time_unit=s,block_tokens=64"
    assert main(["trace", "convert", source, str(out)]) == 0
    trace = traces.load(str(out))
    assert trace.same_requests(traces.load(source))
    assert (trace.block_tokens, trace.arrival_s.tolist()) == (64, [0.0, 1.0, 2.0])
