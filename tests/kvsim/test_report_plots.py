"""The data behind the report's charts: sums over replicas, thinning, scales."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.report.plots import COLOURS, cdf, occupancy, stacked_bytes, stacked_shares, style, thin, total_over_replicas
from kvsim.results.causes import CAUSES

GIB = 2**30


def test_replicas_add_up_between_their_rows_and_on_both_sides_of_a_jump() -> None:
    # Replica 0 rises from 0 at 0 s to 4 at 4 s; replica 1 holds 10 until 2 s, falls to 6 there, and stays.
    series = {
        "time_s": np.array([0.0, 1.0, 2.0, 2.0, 4.0]),
        "replica": np.array([0, 1, 1, 1, 0]),
        "hbm_bytes": np.array([0, 10, 10, 6, 4]),
    }
    times_s, total = total_over_replicas(series, "hbm_bytes")
    assert times_s.tolist() == [0, 0, 1, 1, 2, 2, 4, 4]
    assert total.tolist() == [10, 10, 11, 11, 12, 8, 10, 10]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(2, 40))
def test_thinning_keeps_ends_peaks_and_order(values: list[float], most: int) -> None:
    x, y = np.arange(len(values), dtype=float), np.array(values)
    kept_x, kept_y = thin(x, y, most)
    assert len(kept_x) <= most + 2
    assert kept_x[0] == x[0]
    assert kept_x[-1] == x[-1]
    assert kept_y.max() == y.max()
    assert kept_y.min() == y.min()
    assert (np.diff(kept_x) > 0).all()
    assert kept_y.tolist() == y[kept_x.astype(int)].tolist()


def test_a_line_keeps_its_peak_in_the_chart() -> None:
    values = np.full(50_000, 1.0 * GIB)
    values[31_234] = 7 * GIB
    figure = occupancy({"full": (np.arange(50_000.0), values)}, 10 * GIB)
    (line,) = figure["data"]
    assert len(line["x"]) <= 2_002
    assert max(line["y"]) == 7  # GiB, the unit of the largest value
    assert figure["layout"]["yaxis"]["title"]["text"] == "GiB"


@pytest.mark.parametrize(("used_bytes", "drawn"), [(4 * GIB, True), (2 * GIB, False)])
def test_the_capacity_is_drawn_where_it_would_not_flatten_the_lines(used_bytes: int, drawn: bool) -> None:
    figure = occupancy({"full": (np.array([0.0, 1.0]), np.array([used_bytes, 0.0]))}, 10 * GIB)
    assert ("shapes" in figure["layout"]) == drawn
    top = figure["layout"]["yaxis"]["range"][1]
    assert top >= (10 if drawn else 2)


def test_the_line_of_one_request_is_a_step() -> None:
    (line,) = cdf({"full": np.array([0.5]), "empty": np.empty(0)}, "time")["data"]
    assert (line["x"], line["y"]) == ([0.5, 0.5], [0, 1])


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.02, 0.3], ["10 ms", "20 ms", "50 ms", "100 ms", "200 ms", "500 ms", "1 s", "2 s", "5 s"]),
        ([0.01, 90.0], ["10 ms", "100 ms", "1 s", "10 s", "1.667 min"]),
        ([0.0], []),  # no place on a logarithmic axis
    ],
)
def test_ticks_are_round_times(values: list[float], ticks: list[str]) -> None:
    assert cdf({"full": np.array(values)}, "time")["layout"]["xaxis"]["ticktext"] == ticks


def test_bars_keep_every_part_and_the_labels_short_and_escaped() -> None:
    long = "quest:" + "x" * 60
    figure = stacked_bytes({"a & <b>": {"plans": GIB}, long: {"swaps": 3 * GIB, "plans": GIB}}, ["plans", "swaps"])
    assert {trace["name"]: trace["x"] for trace in figure["data"]} == {"plans": [1, 1], "swaps": [0, 3]}
    first, second = figure["layout"]["yaxis"]["ticktext"]
    assert first == "a &amp; &lt;b&gt;"
    assert len(second) == 30
    assert second.endswith("…")


def test_shares_fill_their_axis() -> None:
    figure = stacked_shares({"full": {"queue": 0.25, "hbm": 0.75}}, ["queue", "hbm", "pcie"])
    assert [trace["x"] for trace in figure["data"]] == [[0.25], [0.75], [0]]
    assert [trace["customdata"] for trace in figure["data"]] == [["25.0%"], ["75.0%"], ["0.0%"]]
    assert figure["layout"]["xaxis"]["range"] == [0, 1]


def test_two_dozen_runs_look_different() -> None:
    assert len({style(index) for index in range(24)}) == 24


def test_causes_of_latency_have_a_colour_each():
    assert len(set(COLOURS)) == len(COLOURS) >= len(CAUSES)


def contrast(colour: str, background: str) -> float:
    """The contrast ratio of WCAG 2.1."""

    def luminance(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(colour), luminance(background)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("background", ["#ffffff", "#12161c"])
def test_every_colour_is_seen_on_light_and_dark(background: str) -> None:
    assert (
        min(contrast(style(index).colour, background) for index in range(len(COLOURS))) >= 3
    )  # WCAG 1.4.11 for graphics
