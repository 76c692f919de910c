"""Measurements of a machine, as far as they need no GPU: medians, spreads, and what an error becomes."""

import itertools
from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

from runtime.calibration import host
from runtime.calibration.batches import batched_copy
from runtime.calibration.measure import measured
from runtime.calibration.timing import Measurement, timed


def test_a_time_is_the_median_and_its_spread_the_interquartile_range() -> None:
    times = itertools.cycle([1.00, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07, 1.08])
    found = timed(lambda: next(times))
    assert found.seconds == pytest.approx(1.04)
    assert found.spread == pytest.approx((1.065 - 1.015) / 1.04)  # quartiles of nine lie between the 2nd and 3rd


def test_an_unsteady_time_is_taken_again_and_the_steadiest_round_kept() -> None:
    calls = 0

    def repeat() -> float:
        nonlocal calls
        calls += 1
        return float(calls) if calls <= 9 else 5.0

    assert timed(repeat) == (5.0, 0.0)
    assert calls == 18


def test_a_machine_that_is_never_steady_is_given_up_on() -> None:
    times = itertools.count(1)
    found = timed(lambda: float(next(times)))
    assert found.spread > 0.1
    assert next(times) == 28  # three rounds of nine


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("CUDA out of memory. Tried\nto allocate"),
            "GEMMs cannot be measured: CUDA out of memory. Tried. N",
        ),
        (
            ModuleNotFoundError("No module named 'triton'"),
            "GEMMs cannot be measured: No module named 'triton'. Nothing",
        ),
    ],
)
def test_what_cuda_says_becomes_one_line(error: Exception, words: str) -> None:
    def section() -> Iterator[Measurement]:
        yield Measurement("gemm", "bf16", {}, 1.0, 0.0)
        raise error

    with pytest.raises(ValueError, match="cannot be measured") as found:
        measured(("GEMMs", section))
    assert str(found.value).startswith(words)


def test_the_host_is_measured_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "COPIED_BYTES", 1 << 18)
    monkeypatch.setattr(host, "ROW_BYTES", (4096, 16384))
    monkeypatch.setattr(host, "PRODUCT", 32)
    monkeypatch.setattr(host, "SEARCHED_KEYS", 1 << 10)
    found = {(one.kernel, *one.arguments.values()): one.seconds for one in host.processors()}
    assert set(found) == {
        ("host_copy", 1 << 18),
        ("host_gather", 1 << 14, 4096),
        ("host_gather", 1 << 12, 16384),
        ("host_product", 2 * 32**3),
        ("host_search", 4 * 128 << 10),
    }
    assert min(found.values()) > 0


def test_batched_copies_are_left_out_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    assert batched_copy() is None
    monkeypatch.setattr("torch.version.cuda", "12.6")
    assert batched_copy() is None
