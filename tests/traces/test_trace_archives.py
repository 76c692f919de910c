"""Agentic sessions and ServeGen clients read from archives built here, and damaged ones refused."""

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest

import traces
from traces import TraceError, agentic, servegen
from traces.stats import info

DATA = Path(traces.__file__).parent / "data"


def write_archive(path, members):
    with tarfile.open(path, "w:xz") as archive:
        for name, text in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(text.encode())
            archive.addfile(header, io.BytesIO(text.encode()))
    return str(path)


def request(t, tokens, ids, **changes):
    row = {"t": t, "type": "n", "model": "m", "in": tokens, "out": 5, "hash_ids": ids, "think_time": 1.5}
    return row | changes


def session(name, *requests):
    return json.dumps({"id": name, "block_size": 64, "requests": requests})


SUBAGENT = {"t": 10.0, "type": "subagent", "requests": [request(0.0, 128, [1, 2]), request(2.5, 200, [1, 2, 9])]}
SESSIONS = {
    "traces/trace_0001.json": session(
        "one", request(0.0, 130, [1, 2]), SUBAGENT, request(11.0, 260, [1, 2, 7, 8], model="other")
    ),
    "traces/trace_0002.json": session("two", request(0.0, 64, [1]), request(3.0, 64, [1], out=0)),
}


def test_sessions_of_an_archive_become_requests(tmp_path):
    path = write_archive(tmp_path / "s.tar.xz", SESSIONS)
    trace = traces.load(f"{path}:start=together")
    assert trace.arrival_s.tolist() == [0.0, 0.0, 10.0, 11.0, 12.5]  # a sub-agent's times count from its marker
    assert trace.session.tolist() == [0, 1, 0, 0, 0]
    assert trace.skipped_rows == 1  # the request without output
    np.testing.assert_array_equal(trace.think_s, [np.nan, np.nan, 1.5, 1.5, 1.5])
    first, stranger, nested, other_model, nested_later = (trace.blocks(i).tolist() for i in range(5))
    assert nested == first  # a sub-agent shares its session's blocks
    assert nested_later[:2] == first
    assert len(nested_later) == 3
    assert not set(first + nested_later) & set(other_model)  # KV is not shared between models
    assert not set(first + nested_later + other_model) & set(stranger)  # nor ids between sessions
    assert other_model[3] - other_model[2] == 1


def test_packing_loses_nothing(tmp_path):
    path = write_archive(tmp_path / "s.tar.xz", SESSIONS)
    agentic.read_archive(Path(path)).save(tmp_path / "s.npz")
    direct, packed = traces.load(path, seed=3), traces.load(str(tmp_path / "s.npz"), seed=3)
    for column in ("arrival_s", "prompt_tokens", "think_s", "block_ids", "block_offsets", "session"):
        np.testing.assert_array_equal(getattr(direct, column), getattr(packed, column))


def test_limit_gives_the_head_of_the_whole():
    whole, part = traces.load("agentic-coding", seed=5), traces.load("agentic-coding", seed=5, limit=300)
    head = whole.head(300)
    for column in ("arrival_s", "prompt_tokens", "think_s", "block_ids", "block_offsets", "session"):
        np.testing.assert_array_equal(getattr(head, column), getattr(part, column))


def test_poisson_session_starts_have_their_rate():
    trace = traces.load("agentic-coding:session_rate_per_s=2", seed=1)
    _, first = np.unique(trace.session, return_index=True)
    starts_s = np.sort(trace.arrival_s[first])
    # 709 exponential gaps: the mean's standard error is its value / sqrt(709).
    assert np.diff(starts_s).mean() == pytest.approx(0.5, rel=4 / math.sqrt(709))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (request(0.0, 130, [1]), r"trace_0001\.json:1: hash_ids=\[1\]: must have one id"),
        (request(0.0, 0, []), r"in=0: must be a whole number of tokens from 1"),
        (request(0.0, 64, [1], out=-1), r"out=-1: must be a whole number of tokens from 0"),
        (request(-2.0, 64, [1]), r"t=-2\.0: must be a finite number"),
        (request(0.0, 64, [1], think_time=math.inf), r"think_time=inf: must be a finite number"),
        (request(0.0, 64, [-1]), r"hash_ids=\[-1\]: must be a list of whole numbers"),
        (request(0.0, 64.5, [1]), r"in=64\.5: must be a whole number"),
        (request(0.0, 64, [2**40]), r"hash_ids=\[1099511627776\]: must be a list of whole numbers from 0 to"),
        (request(0.0, 64, [1], model=None), r"model=None: must be the model's name"),
        ({"type": "n"}, r"in=None: must be a whole number"),
        ({}, r"trace_0001\.json: not an agentic session \(KeyError: 'type'\)"),
    ],
)
def test_bad_sessions_are_named(tmp_path, row, message):
    path = write_archive(tmp_path / "s.tar.xz", {"trace_0001.json": session("one", row)})
    with pytest.raises(TraceError, match=message):
        traces.load(path)


def test_damaged_archives_are_refused(tmp_path):
    for file in ("servegen/deepseek-r1.tar.xz", "agentic-coding/sessions.npz"):
        cut = tmp_path / Path(file).name
        cut.write_bytes((DATA / file).read_bytes()[:-1000])
        with pytest.raises(TraceError, match=rf"{cut.name}: truncated"):
            traces.load(str(cut))
    path = write_archive(tmp_path / "other.tar.xz", {"README": "hello"})
    with pytest.raises(TraceError, match=r"README: unknown archive"):
        traces.load(path)
    with pytest.raises(TraceError, match="skip_bad_rows is for tables"):
        traces.load(path, skip_bad_rows=True)


WINDOWS = "0,2,3,Gamma,0.1111,4.5\n600,0,0,,0,0\n1200,1,1,Weibull,0.5,7\n"
TABLES = json.dumps({"0": {"input_tokens": "{0: 0.5, 10: 0.25, 20: 0.25}", "output_tokens": "{7: 1.0}"}})
CLIENT = {"c/m/chunk-3-trace.csv": WINDOWS, "c/m/chunk-3-dataset.json": TABLES}


def test_sampled_requests_follow_the_stated_rates_and_tables(tmp_path):
    path = Path(write_archive(tmp_path / "m.tar.xz", CLIENT))
    clients = servegen.read_clients(path)
    runs = [servegen.to_trace(clients, servegen.Options(span_s=1800), name="m", seed=seed) for seed in range(40)]
    early = np.array([np.count_nonzero(run.arrival_s < 600) for run in runs])
    late = np.array([np.count_nonzero(run.arrival_s >= 1200) for run in runs])
    # Counts of a stationary renewal process have mean rate * span and variance about CV^2 * rate * span: 1,200 with
    # CV 3 and 600 with the Weibull's CV sqrt(5). Four standard errors of the mean over 40 runs.
    assert early.mean() == pytest.approx(1200, abs=4 * 3 * math.sqrt(1200 / 40))
    assert late.mean() == pytest.approx(600, abs=4 * math.sqrt(5 * 600 / 40))
    assert all(((run.arrival_s < 600) | (run.arrival_s >= 1200)).all() for run in runs)  # the idle window
    prompts = np.concatenate([run.prompt_tokens for run in runs])
    assert set(prompts.tolist()) == {10, 20}  # mass on 0 tokens is left out
    assert (prompts == 10).mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(prompts)))
    assert runs[0].tenants == ("client-3",)


def test_deepseek_r1_reproduces_its_stated_rate():
    # Published over all clients and the whole day: 16.0 requests/s on average, 1,383,669 expected requests.
    clients = servegen.read_clients(DATA / "servegen" / "deepseek-r1.tar.xz")
    assert len(clients) == 73
    windows = [window for client in clients.values() for window in client.windows]
    assert 600 * sum(window.rate_rps for window in windows) == pytest.approx(1_383_669, abs=1)
    start = 36_000
    expected = 600 * sum(window.rate_rps for window in windows if start <= window.start_s < start + 3600)
    found = info(traces.load(f"servegen-deepseek-r1:start_s={start}"))
    assert found["requests"] == pytest.approx(expected, rel=0.05)


def test_a_client_samples_the_same_whoever_else_is_chosen():
    alone = traces.load("servegen-deepseek-r1:start_s=3000,span_s=600,clients=0", seed=9)
    both = traces.load("servegen-deepseek-r1:start_s=3000,span_s=600,clients=0+1", seed=9)
    mine = both.tenant == both.tenants.index("client-0")
    np.testing.assert_array_equal(both.arrival_s[mine], alone.arrival_s)
    np.testing.assert_array_equal(both.prompt_tokens[mine], alone.prompt_tokens)
    assert alone.arrival_s.max() < 600


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ":start_s=1000,span_s=1000", r"start_s \+ span_s=2000: the model ends at 1800 s"),
        ({}, ":start_s=600,span_s=600", r"no client with length tables has traffic from 600 to 1200 s"),
        ({}, ":clients=4,span_s=60", r"clients=\[4\]: not in the archive; known: 3"),
        ({}, ":clients=a", r"clients=a: must be all, or client numbers joined by \+"),
        ({}, ":start_s=-1", r"start_s=-1\.0: must be finite and not negative"),
        ({}, ":span_s=0", r"span_s=0\.0: must be finite and above 0"),
        ({"c/m/notes.txt": ""}, "", r"c/m/notes\.txt: not a ServeGen file"),
        ({"c/m/chunk-3-trace.csv": "0,2\n"}, "", r"chunk-3-trace\.csv:1: window=0,2: must be start, rate"),
        ({"c/m/chunk-3-trace.csv": "0,-2,1,Gamma,1,1\n"}, "", r"rate=-2\.0: must be finite and above 0"),
        ({"c/m/chunk-3-trace.csv": "0,2,1,Pareto,1,1\n"}, "", r"family=Pareto: must be gamma or weibull"),
        ({"c/m/chunk-3-dataset.json": '{"0": 7}'}, ":span_s=60", r"not a map from window start to length tables"),
        ({"c/m/chunk-3-dataset.json": "[]"}, ":span_s=60", r"not a map from window start to length tables"),
        ({"c/m/chunk-3-dataset.json": TABLES.replace("7: 1.0", "7")}, ":span_s=60", r"output_tokens=\{7\}: must be a"),
        ({"c/m/chunk-3-dataset.json": TABLES.replace("7: 1", "7: -1")}, ":span_s=60", r"probabilities must be finite"),
    ],
)
def test_bad_models_and_options_are_named(tmp_path, changes, options, message):
    path = write_archive(tmp_path / "m.tar.xz", CLIENT | changes)
    with pytest.raises(TraceError, match=message):
        traces.load(path + options)


def test_clients_without_length_tables_are_left_out_with_a_note(tmp_path):
    bare = {"c/m/chunk-5-trace.csv": WINDOWS, "c/m/chunk-5-dataset.json": '{"0": {"input_tokens": "{}"}}'}
    trace = traces.load(write_archive(tmp_path / "m.tar.xz", CLIENT | bare) + ":span_s=600")
    assert trace.tenants == ("client-3",)
    assert "clients without length tables left out: 5" in trace.notes
