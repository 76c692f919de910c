"""The points of a sweep: which there are, in which order, and what cannot be a dimension."""

import math
import statistics

import pytest

from kvsim.scenario.design import Span, dimensions, points


def test_every_combination_the_last_dimension_first() -> None:
    over = dimensions(["gpus=1,2", "policy=full", "policy=shadowkv:budget_tokens=512", "prefix-cache-ddr=0,1TiB"])
    assert over == {
        "gpus": [1, 2],
        "policy": [["full"], ["shadowkv:budget_tokens=512"]],  # commas of its own are no separators
        "prefix_cache_ddr": ["0", "1TiB"],
    }
    found = points(over, None, 0)
    assert len(found) == 8
    assert found[:3] == [
        {"gpus": 1, "policy": ["full"], "prefix_cache_ddr": "0"},
        {"gpus": 1, "policy": ["full"], "prefix_cache_ddr": "1TiB"},
        {"gpus": 1, "policy": ["shadowkv:budget_tokens=512"], "prefix_cache_ddr": "0"},
    ]


def test_drawn_points_are_those_of_their_seed_and_cover_their_spans() -> None:
    over = dimensions(["max_num_seqs=1..4", "rate_scale=0.01..100:log", "policy=full", "policy=quest"])
    assert over["max_num_seqs"] == Span(1, 4, whole=True, log=False)
    found = points(over, 4_000, 7)
    assert found == points(over, 4_000, 7) != points(over, 4_000, 8)
    for value in (1, 2, 3, 4):  # each a quarter, within five standard deviations
        assert sum(point["max_num_seqs"] == value for point in found) == pytest.approx(1_000, abs=137)
    logs = [math.log10(point["rate_scale"]) for point in found]
    assert -2 <= min(logs) < -1.99 < 1.99 < max(logs) <= 2
    assert statistics.fmean(logs) == pytest.approx(0, abs=0.1)  # uniform over four decades: 1.15 / 63 is its error
    assert {point["policy"][0] for point in found} == {"full", "quest"}


def test_paths_with_dots_are_no_spans() -> None:
    assert dimensions(["gpu=../a.yaml,h100-sxm"]) == {"gpu": ["../a.yaml", "h100-sxm"]}


def test_whole_numbers_of_a_logarithmic_span_include_both_ends() -> None:
    found = [point["gpus"] for point in points(dimensions(["gpus=1..8:log"]), 2_000, 0)]
    assert set(found) == set(range(1, 9))
    assert found.count(1) > found.count(8)


@pytest.mark.parametrize(
    ("texts", "draws", "says"),
    [
        (["gpus"], None, r"--over 'gpus' must be written KEY=VALUE"),
        (["gpu_s=1"], None, r"unknown option 'gpu_s'"),
        (["gpus=two"], None, r"--over gpus: 'two' is not a whole number"),
        (["gpus=1,2,1"], None, r"--over gpus has '1' twice"),
        (["gpus=1,2", "gpus=2"], None, r"--over gpus has '2' twice"),
        (["gpus=1..8"], None, r"--over gpus is a span.*--draw N"),
        (["gpus=8..1"], 3, r"the ends of this span must be finite and rising"),
        (["rate_scale=0..1:log"], 3, r"must be above zero and rising"),
        (["rate_scale=1..2:cubic"], 3, r"'cubic' is no scale of a span"),
        (["gpus=1..2", "gpus=4"], 3, r"--over gpus has a span and other values"),
        (["prefix_cache_ddr=1GiB..1TiB"], 3, r"only options that are plain numbers have spans"),
        (["limit=10..100"], 3, r"only options that are plain numbers have spans"),
        (["seeds=1,2"], None, r"--over seed=0,1,2"),
        (["perfetto=0s-1s"], None, r"simulate a point of it alone"),
        (["skip_bad_rows=maybe"], None, r"'maybe' is not true or false"),
        ([f"{key}={','.join(map(str, range(1, 1_002)))}" for key in ("gpus", "max_num_seqs")], None, "1 to 1,000,000"),
        ([], None, "name its dimensions with --over"),
    ],
)
def test_what_is_no_design(texts: list[str], draws: int | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        points(dimensions(texts), draws, 0)
