"""The bundled traces against the statistics published with them, and against facts of their sources."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import traces
from traces import agentic
from traces.stats import infinite_cache_hit_ratio, info, lru_hit_ratio, percentiles

DATA = Path(traces.__file__).parent / "data"

# requests, span s, prompt and output p50/p90/p99/max, rate, CV, hit ratio %, block accesses, distinct blocks: the
# statistics that the collectors of these traces computed from the original files.
PUBLISHED = {
    "mooncake-conversation": (
        (12_031, 3537.0, (6_909, 27_367, 85_401, 126_195), (350, 597, 1_120, 2_000), 3.40, 3.03),
        (36.64, 288_500, 182_790),
    ),
    "mooncake-synthetic": (
        (3_993, 1022.0, (11_587, 38_615, 66_458, 191_378), (69, 389, 769, 893), 3.91, 1.01),
        (63.96, 121_877, 43_924),
    ),
    "azure-2023-code": ((8_819, 3435.9, (1_469, 5_194, 7_436, 7_437), (13, 55, 252, 1_899), 2.57, 13.15), None),
    "azure-2023-conv": ((19_366, 3501.7, (1_020, 2_735, 4_142, 14_050), (129, 424, 601, 1_000), 5.53, 1.09), None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_statistics(name):
    (requests, span_s, prompt, output, rate, cv), reuse = PUBLISHED[name]
    found = info(traces.load(name))
    assert found["requests"] == requests
    assert round(found["span_s"], 1) == span_s
    assert tuple(found["prompt_percentiles"].values()) == prompt
    assert tuple(found["output_percentiles"].values()) == output
    assert round(found["rate_rps"], 2) == rate
    assert round(found["interarrival_cv"], 2) == cv
    if reuse is None:
        assert found["infinite_cache_hit_ratio"] is None
        assert found["block_tokens"] == 0
    else:
        ratio = round(100 * found["infinite_cache_hit_ratio"], 2)
        assert (ratio, found["prompt_blocks"], found["distinct_blocks"]) == reuse


@pytest.mark.parametrize(("name", "share"), [("mooncake-conversation", 0.37), ("mooncake-synthetic", 0.48)])
def test_lru_of_three_million_tokens_gets_the_published_share_of_the_maximum(name, share):
    trace = traces.load(name)
    reached = lru_hit_ratio(trace, 3_000_000 // trace.block_tokens) / infinite_cache_hit_ratio(trace)
    assert round(reached, 2) == share


def test_lru_at_the_published_median_stack_distance_gets_half_of_the_reuse():
    # A reuse hits an LRU exactly when fewer other blocks than its capacity were touched in between; the published
    # median distance is 8,355 blocks, so a capacity of one more holds half of all reuses.
    trace = traces.load("mooncake-conversation")
    assert lru_hit_ratio(trace, 8_356) / infinite_cache_hit_ratio(trace) == pytest.approx(0.5, abs=1e-3)


def test_one_head_block_is_in_every_conversation_request_and_the_next_in_43():
    trace = traces.load("mooncake-conversation")
    uses = Counter(trace.block_ids.tolist()).most_common(2)
    assert uses[0] == (0, 12_031)
    assert uses[1][1] == 43


def test_mooncake_spread_moves_arrivals_inside_their_tick_only():
    recorded, spread = traces.load("mooncake-conversation"), traces.load("mooncake-conversation:spread_s=3", seed=1)
    assert len(np.unique(recorded.arrival_s)) == 1_180  # published: the recorded arrivals are ticks
    assert len(np.unique(spread.arrival_s)) > 12_000
    moved_s = spread.arrival_s - recorded.arrival_s
    assert moved_s.min() >= 0
    assert moved_s.max() < 3
    assert (spread.block_ids == recorded.block_ids).all()


def test_first_azure_rows_are_those_of_the_source():
    # The source's first two lines: 18:17:03.9799600,4808,10 and 18:17:04.0319600,3180,8.
    trace = traces.load("azure-2023-code", limit=2)
    assert trace.arrival_s.tolist() == [0.0, 0.052]
    assert trace.prompt_tokens.tolist() == [4808, 3180]
    assert trace.output_tokens.tolist() == [10, 8]


def test_packed_sessions_have_the_published_statistics():
    # These hold for all 49,334 recorded rows, with ids keyed by session alone.
    stored = agentic.Sessions.read(DATA / "agentic-coding" / "sessions.npz")
    assert len(stored.session_names) == 710
    assert len(stored.session) == 49_334
    assert tuple(percentiles(stored.prompt_tokens).values()) == (103_656, 233_633, 498_617, 894_371)
    assert tuple(percentiles(stored.output_tokens).values()) == (216, 898, 3_687, 18_195)
    assert np.count_nonzero(stored.output_tokens == 0) == 27
    accesses = int(stored.run_length.sum(dtype=np.int64))
    assert accesses == 94_310_647
    distinct = _covered(np.repeat(stored.session, stored.runs), stored.run_start, stored.run_length)
    assert distinct == 3_450_959
    assert round(100 * (1 - distinct / accesses), 2) == 96.34
    models = {(session, model) for session, model in zip(stored.session.tolist(), stored.model.tolist(), strict=True)}
    assert sum(n > 1 for n in Counter(session for session, _ in models).values()) == 48


def _covered(session, start, length):
    """Distinct (session, id) pairs in runs of ids: the length of the union of intervals."""
    covered, end = 0, (-1, 0)
    for key, first, n in sorted(zip(session.tolist(), start.tolist(), length.tolist(), strict=True)):
        begin = max(first, end[1]) if key == end[0] else first
        covered += max(0, first + n - begin)
        end = (key, max(first + n, end[1]) if key == end[0] else first + n)
    return covered


def test_all_sessions_load_without_the_requests_that_had_no_output():
    trace = traces.load("agentic-coding:start=together")
    assert len(trace) == 49_334 - 27
    assert trace.skipped_rows == 27
    assert any("27 requests" in note for note in trace.notes)
    assert len(np.unique(trace.session)) == 710
    assert (np.diff(trace.block_offsets) == trace.prompt_tokens // 64).all()


def test_every_bundled_trace_is_described_licensed_and_small():
    for bundled in traces.names():
        file = DATA / bundled.file
        assert file.stat().st_size < 2_000_000
        assert "\n" not in bundled.description
        licence = (file.parent / "LICENSE").read_text()
        assert ("Apache License" if bundled.licence == "Apache-2.0" else "Attribution 4.0") in licence
        assert bundled.attribution
        assert len(traces.load(bundled.name, limit=5)) == 5


def test_conversion_to_json_lines_gives_mooncakes_file_back_byte_for_byte(tmp_path):
    traces.write(traces.load("mooncake-synthetic"), tmp_path / "copy.jsonl")
    with gzip.open(DATA / "mooncake" / "synthetic_trace.jsonl.gz") as original:
        assert (tmp_path / "copy.jsonl").read_bytes() == original.read()


def test_import_is_light():
    code = "import json, sys, traces; print(json.dumps([m for m in ('pyarrow', 'torch', 'simpy') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "mooncake-conversaton",
            r"unknown trace 'mooncake-conversaton'; known, nearest first: mooncake-conversation, ",
        ),
        ("no/such/file.csv", r"no/such/file\.csv: no such file; give a path, or one of mooncake-conversation"),
        ("azure-2023-code:spread_s=3", r"azure-2023-code option: takes no options, got 'spread_s'"),
        ("mooncake-synthetic:spred_s=3", r"unknown trace option key 'spred_s'; known, nearest first: spread_s"),
        ("mooncake-synthetic:spread_s=fast", r"trace option spread_s=fast: not a valid float"),
        ("mooncake-synthetic:spread_s=-1", r"spread_s=-1\.0: must be finite and not negative"),
        ("mooncake-synthetic:spread_s", r"'spread_s' is not key=value"),
        ("agentic-coding:start=later", r"start=later: must be one of poisson, together"),
        ("agentic-coding:session_rate_per_s=0", r"session_rate_per_s=0\.0: must be finite and above 0"),
        ("agentic-coding:start=poisson,start=together", r"start=together: given twice"),
    ],
)
def test_unknown_names_and_options_say_what_is_known(text, message):
    with pytest.raises(traces.TraceError, match=message):
        traces.load(text)


def test_limit_below_one_is_refused():
    with pytest.raises(traces.TraceError, match="limit=0: must be at least 1"):
        traces.load("azure-2023-code", limit=0)
