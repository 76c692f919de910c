"""Calibration: fits recover the constants that times were made from, and nothing is written of what went wrong."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvsim.__main__ import main
from kvsim.cli.calibrate import write_together
from kvsim.hardware.calibration.calibrate import calibration, catalogued
from kvsim.hardware.calibration.document import as_yaml
from kvsim.hardware.calibration.fits import attention_seconds, fit_decode, fit_transfers, gemm_seconds
from kvsim.hardware.calibration.samples import Sample, chosen, joined
from kvsim.hardware.calibration.solver import solve
from kvsim.hardware.catalogue import gpu_names, load_gpu
from kvsim.hardware.kernels.attention import DecodeFit
from kvsim.hardware.kernels.fitted import FittedPrices

NOISE = 0.02
SHAPES = [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (1280, 8192), (2048, 2048)]
HEADS = [(32, 8), (64, 8), (8, 1), (32, 32), (16, 4), (28, 4)]
GPU = load_gpu("h200-sxm")
CHIP = GPU.kernels.chip


def machine(seed: int = 0, noise: float = NOISE) -> list[Sample]:
    """Every measurement of a machine whose kernels cost what the H200's serving set says, give or take noise."""
    chance, kernels = random.Random(seed), GPU.kernels
    found = []

    def add(kernel: str, dtype: str, seconds: float, **arguments: int) -> None:
        noisy = seconds * math.exp(chance.gauss(0, noise))
        found.append(
            Sample(kernel=kernel, dtype=dtype, arguments=tuple(arguments.items()), seconds=noisy, spread=noise)
        )

    for n, k in SHAPES:
        for m in (1, 8, 32, 64, 128, 256, 1024, 4096):
            add("gemm", "bf16", kernels.gemm_s(m=m, n=n, k=k, dtype="bf16"), m=m, n=n, k=k)
    for heads, kv_heads in HEADS:
        for batch in (1, 4, 16, 64):
            for tokens in (128, 1024, 4096, 16384):
                shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": 128}
                decode_s = kernels.decode_attention_s(batch=batch, context_tokens=tokens, **shape)
                add("decode_attention", "bf16", decode_s, batch=batch, context_tokens=tokens, **shape)
                if batch <= 4:
                    prefill_s = kernels.prefill_attention_s(batch=batch, tokens=tokens, **shape)
                    add("prefill_attention", "bf16", prefill_s, batch=batch, tokens=tokens, **shape)
    for power in range(14, 31, 2):
        nbytes = 1 << power
        add("elementwise", "", kernels.elementwise_s(nbytes=nbytes), nbytes=nbytes)
        add("copy_to_hbm", "", kernels.copy_s(nbytes=nbytes), nbytes=nbytes, descriptors=1)
        add("copy_to_host", "", kernels.copy_s(nbytes=nbytes, to_hbm=False), nbytes=nbytes, descriptors=1)
    add("copy_duplex", "", kernels.copy_s(nbytes=1 << 30, duplex=True), nbytes=1 << 30, descriptors=1)
    for pieces in (256, 1024):
        nbytes = pieces * 4096
        add("copy_batched", "", kernels.copy_s(nbytes=nbytes, descriptors=pieces), nbytes=nbytes, descriptors=pieces)
    for row_bytes in (128, 256, 512, 1024, 2048, 4096, 16384):
        for gib in (1, 2, 4, 8):
            for rows in (4096, 16384, 65536):
                asked = {"rows": rows, "row_bytes": row_bytes, "span_bytes": gib << 30}
                add("gather", "", kernels.gather_s(**asked), **asked)
    return found


def test_the_solver_finds_a_line_through_noise_and_keeps_bounds() -> None:
    x = np.linspace(1, 100, 200)
    y = (3 + 0.5 * x) * np.exp(np.random.default_rng(1).normal(0, 0.02, 200))
    found = solve(lambda v: np.log((v["a"] + v["b"] * x) / y), {"a": (1.0, 0.01, 100.0), "b": (1.0, 0.01, 100.0)})
    assert found["a"] == pytest.approx(3, rel=0.05)
    assert found["b"] == pytest.approx(0.5, rel=0.02)
    bound = solve(lambda v: np.log((v["a"] + v["b"] * x) / y), {"a": (1.0, 0.01, 2.0), "b": (1.0, 0.01, 100.0)})
    assert bound["a"] == 2.0
    assert bound["b"] > found["b"]


def test_the_solver_wants_more_times_than_constants() -> None:
    with pytest.raises(ValueError, match="1 measured times cannot give 2 constants"):
        solve(lambda v: np.array([v["a"] + v["b"]]), {"a": (1.0, 0.1, 2.0), "b": (1.0, 0.1, 2.0)})


def test_prices_of_columns_are_those_of_single_kernels() -> None:
    prices = load_gpu("h200-sxm@measured").kernels.prices
    assert isinstance(prices, FittedPrices)
    samples = machine()
    gemms = chosen(samples, "gemm", "bf16")
    fit = dict(prices.fits.gemm)["bf16"]
    single = [fit.seconds(CHIP, "bf16", **dict(one.arguments)) for one in gemms.samples]
    np.testing.assert_allclose(gemm_seconds(fit, CHIP, "bf16", gemms), single, rtol=1e-12)
    decodes = chosen(samples, "decode_attention", "bf16")
    single = [
        load_gpu("h200-sxm@measured").kernels.decode_attention_s(**dict(one.arguments)) for one in decodes.samples
    ]
    found = attention_seconds(dict(prices.fits.decode_attention)["bf16"], CHIP, decodes)
    np.testing.assert_allclose(found, single, rtol=1e-12)


def test_a_machine_like_the_serving_set_gets_the_prices_of_the_serving_set() -> None:
    result = calibration("h200-sxm", [machine(1), machine(2)], "Measured never")
    for one in result.residuals:
        assert one.mape < 0.05, one
        assert abs(one.bias) < 0.03, one
    transfers = fit_transfers(result.samples, CHIP, 1.0)
    prices = GPU.kernels.prices
    assert isinstance(prices, FittedPrices)
    known = prices.fits.transfers
    for name in ("copy_s", "descriptor_s", "one_way", "both_ways", "gather", "near_rows_per_s", "far_rows_per_s"):
        assert getattr(transfers, name) == pytest.approx(getattr(known, name), rel=0.05), name


def test_the_cost_of_joining_parts_is_recovered() -> None:
    known = DecodeFit(
        start_s=6e-6, hbm=0.9, sharpness=2.0, head_s=1e-8, query_s=1e-9, copy_s=1e-8, split_s=1e-8, token_s=1e-12,
        lone_token_s=1e-12, whole_hbm=0.6, part_s=2e-7,
    )  # fmt: skip
    samples = [one for one in machine() if one.kernel == "decode_attention"]
    times = attention_seconds(known, CHIP, chosen(samples, "decode_attention", "bf16"))
    made = [replace(one, seconds=float(time)) for one, time in zip(samples, times, strict=True)]
    found = fit_decode(made, CHIP)
    assert found.part_s == pytest.approx(2e-7, rel=0.1)
    assert found.whole_hbm == pytest.approx(0.6, rel=0.03)
    assert found.hbm == pytest.approx(0.9, rel=0.03)


def test_parts_of_a_split_sequence_by_hand() -> None:
    fit = DecodeFit(
        start_s=0, hbm=1, sharpness=2, head_s=0, query_s=0, copy_s=0, split_s=0, token_s=0, lone_token_s=0, part_s=1e-6
    )
    assert fit.joining_s(CHIP, 1, 4096, 8) == pytest.approx(32e-6)  # blocks of 128 tokens
    assert fit.joining_s(CHIP, 2, 131072, 8) == pytest.approx(2 * 132 / 16 * 1e-6)  # SMs
    assert fit.joining_s(CHIP, 1, 131072, 1) == pytest.approx(128e-6)  # the most
    assert fit.joining_s(CHIP, 32, 131072, 8) == 0  # 256 KV heads fill 132 SMs


def test_the_file_is_read_back_with_a_source_for_each_figure(tmp_path: Path) -> None:
    result = calibration("h200-sxm", [machine()], "Measured on a day, a GPU, driver 1, torch 2")
    path = tmp_path / "mine.yaml"
    write_together({path: result.yaml, path.with_suffix(".json"): result.record})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mine.json", "mine.yaml"]
    gpu = load_gpu(f"{path}@measured")
    assert gpu.rates.pcie_h2d_Bps == result.document["measured"]["pcie_h2d_Bps"]
    sources = dict(gpu.sources)
    for name in result.document["measured"]:
        assert sources[name].startswith("Measured on a day, a GPU, driver 1, torch 2: "), name
    asked = {"m": 64, "n": 4096, "k": 4096, "dtype": "bf16"}
    assert gpu.kernels.gemm_s(**asked) == pytest.approx(GPU.kernels.gemm_s(**asked), rel=0.1)
    # What was not measured is what serving says.
    experts = {"tokens": 64, "hidden": 4096, "intermediate": 1536, "experts": 64, "top_k": 4, "dtype": "bf16"}
    assert gpu.kernels.moe_s(**experts) == pytest.approx(GPU.kernels.moe_s(**experts), rel=1e-3)
    record = json.loads(result.record)
    assert len(record["samples"]) == len(machine())
    assert as_yaml(result.document) == path.read_text(encoding="utf-8")


def test_every_catalogued_device_is_in_the_catalogue() -> None:
    assert catalogued("NVIDIA H200") == "h200-sxm"
    with pytest.raises(ValueError, match="no GPU that its driver calls 'GeForce 256'; give --gpu one of a100-40g-sxm"):
        catalogued("GeForce 256")
    from kvsim.hardware.calibration.calibrate import _SAME

    assert set(_SAME.values()) <= set(gpu_names())


def test_the_record_in_the_repository_gives_the_catalogue_s_set() -> None:
    root = Path(__file__).parents[2]
    record = json.loads((root / "benchmarks/results/calibration_h200-sxm.json").read_text(encoding="utf-8"))
    kernels = load_gpu("h200-sxm@measured").kernels
    limits = {"gemm": 0.06, "prefill_attention": 0.08, "decode_attention": 0.08, "gather": 0.08}
    errors: dict[str, list[float]] = {}
    for row in record["samples"]:
        if row["kernel"] not in limits:
            continue
        names = [name for name in row if name not in ("kernel", "dtype", "us", "spread", "drift")]
        one = Sample(
            kernel=row["kernel"], dtype=row["dtype"], arguments=tuple((n, row[n]) for n in names), seconds=1, spread=0
        )
        if one.seen:
            continue
        dtype = {"dtype": row["dtype"]} if row["kernel"] == "gemm" else {}
        price = getattr(kernels, f"{row['kernel']}_s")(**dict(one.arguments), **dtype)
        errors.setdefault(f"{row['kernel']} {row['dtype']}", []).append(abs(price / row["us"] * 1e6 - 1))
    assert len(errors) == 5
    for name, found in errors.items():
        assert sum(found) / len(found) <= limits[name.split()[0]], name


def test_passes_are_joined_by_their_geometric_mean() -> None:
    one = Sample(kernel="gather", dtype="", arguments=(("rows", 1),), seconds=1.0, spread=0.01)
    (both,) = joined([[one], [replace(one, seconds=1.21, spread=0.02)]])
    assert both.seconds == pytest.approx(1.1)
    assert both.drift == pytest.approx(0.21)
    assert both.spread == 0.02
    with pytest.raises(ValueError, match="passes measured different shapes"):
        joined([[one], [replace(one, arguments=(("rows", 2),))]])


def test_a_busy_machine_is_refused() -> None:
    unsteady = [replace(one, spread=0.3) if one.kernel == "gather" else one for one in machine()]
    with pytest.raises(ValueError, match="this machine is busy: times of gather spread by 30%"):
        calibration("h200-sxm", [unsteady], "x")
    slower = [replace(one, seconds=1.2 * one.seconds) for one in machine(noise=0.0)]
    with pytest.raises(ValueError, match="this machine is busy: times of gemm bf16 spread by 20%"):
        calibration("h200-sxm", [machine(noise=0.0), slower], "x")


def test_times_quicker_than_the_datasheet_are_refused() -> None:
    with pytest.raises(ValueError, match=r"less than the .* s that the datasheet of t4 allows; name the GPU"):
        calibration("t4", [machine()], "x")


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_time_must_be_one(seconds: float) -> None:
    with pytest.raises(ValueError, match="a time must be above 0"):
        Sample(kernel="gemm", dtype="bf16", arguments=(), seconds=seconds, spread=0)


def test_nothing_is_left_where_one_of_the_files_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        write_together({tmp_path / "a.yaml": "a", tmp_path / "nowhere" / "a.json": "{}"})
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["hardware", "calibrate", "--out", str(tmp_path / "a.yaml")]) == 2
    assert "torch sees no NVIDIA GPU here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "words"), [("a.txt", "must end in .yaml"), ("nowhere/a.yaml", "name a file in a folder that takes one")]
)
def test_where_nothing_could_be_written_is_told_first(
    tmp_path: Path, out: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["hardware", "calibrate", "--out", str(tmp_path / out)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("end", ["interrupted", "busy", "well"])
def test_the_command_leaves_both_files_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    pytest.importorskip("torch")
    from kvsim.cli import calibrate
    from runtime.calibration import device as devices

    def passes(count: int, *, quick: bool) -> list[list[Sample]]:
        assert (count, quick) == (1, True)
        if end == "interrupted":
            raise KeyboardInterrupt
        return [machine() if end == "well" else [replace(one, spread=0.5) for one in machine()]]

    monkeypatch.setattr(devices, "device", lambda: devices.Device("NVIDIA H200", 1, "580.1", "2.11"))
    monkeypatch.setattr(calibrate, "_passes", passes)
    code = main(["hardware", "calibrate", "--quick", "--out", str(tmp_path / "a.yaml")])
    said = capsys.readouterr()
    if end == "well":
        assert code == 0
        assert load_gpu(f"{tmp_path / 'a.yaml'}@measured").parameter_set == "measured"
        assert "not fitted" in said.out
        assert main(["hardware", "calibrate", "--quick", "--json", "--out", str(tmp_path / "b.yaml")]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["file"] == str(tmp_path / "b.yaml")
        assert {one["kernel"] for one in shown["residuals"]} >= {
            "gemm",
            "prefill_attention",
            "decode_attention",
            "gather",
        }
        return
    assert code == 2
    assert ("was interrupted; nothing was written" if end == "interrupted" else "is busy") in said.err
    assert list(tmp_path.iterdir()) == []
