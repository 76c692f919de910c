"""The hardware catalogue: sources, parameter sets, curves, and errors in users' files."""

import math
from dataclasses import fields
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvsim.__main__ import main
from kvsim.hardware.catalogue import Host, gpu_names, host_names, load_gpu, load_host
from kvsim.hardware.rates import Rates, interpolate

RATES = [field.name for field in fields(Rates)]
USER_GPU = """
memory_bytes: 1000
sms: 10
datasheet:
  hbm_Bps: 1e12
  matmul_flops: {bf16: 100e12, fp32: 10e12}
  attention_flops: 100e12
  elementwise_Bps: 1e12
  topk_elements_per_s: 1e11
  launch_s: 0
  sync_s: 0
  pcie_h2d_Bps: 32e9
  pcie_d2h_Bps: 32e9
  pcie_latency_s: 0
  gather_curve: {1: 32e9}
  gather_sm_share: 0
  nvlink_Bps: 0
  nvlink_latency_s: 0
eager:
  hbm_Bps: 50%
  matmul_flops: 40%
  gather_curve: {256: 25%, 1024: 50%}
  launch_s: 2e-6
measured:
  matmul_flops: {bf16: 45e12}
  pcie_h2d_Bps: 20e9
sources:
  datasheet: a page
  eager: a paper
  eager.launch_s: a stopwatch
"""


def user_gpu(folder: Path, *changes: tuple[str, str]) -> str:
    text = USER_GPU
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", gpu_names())
def test_every_figure_of_every_gpu_has_its_source(name: str) -> None:
    for parameter_set in load_gpu(name).parameter_sets:
        gpu = load_gpu(f"{name}@{parameter_set}")
        sources = dict(gpu.sources)
        fitted = ["kernels"] if parameter_set in ("serving", "measured") else []
        capacities = ["memory_bytes", "sms", *(["device_bytes"] if gpu.device_bytes else [])]
        assert sorted(sources) == sorted([*RATES, *capacities, *fitted])
        assert gpu.device_bytes is None or 0.9 * gpu.memory_bytes < gpu.device_bytes < gpu.memory_bytes
        assert all(len(text) > 10 for text in sources.values())


@pytest.mark.parametrize("name", host_names())
def test_every_figure_of_every_host_has_its_source(name: str) -> None:
    sources = dict(load_host(name).sources)
    assert sorted(sources) == sorted({field.name for field in fields(Host)} - {"name", "sources"})


@pytest.mark.parametrize("name", gpu_names())
def test_eager_rates_stay_below_the_peaks(name: str) -> None:
    peak, real = load_gpu(f"{name}@datasheet").rates, load_gpu(f"{name}@eager").rates
    for field in RATES:
        if field in ("matmul_flops", "gather_curve", "gather_sm_share"):
            continue
        ideal, actual = getattr(peak, field), getattr(real, field)
        assert actual >= ideal if field.endswith("_s") and not field.endswith("per_s") else actual <= ideal, field
    for dtype, flops in peak.matmul_flops:
        assert 0 < real.flops(dtype) < flops
    assert real.gather_curve[-1][1] <= real.pcie_h2d_Bps
    assert all(low[1] <= high[1] for low, high in pairwise(real.gather_curve))
    assert 0 < real.gather_sm_share < 1


def test_a100_achieves_what_the_papers_report() -> None:
    gpu = load_gpu("a100-80g-sxm@eager")
    assert gpu.memory_bytes == 80 * 2**30
    assert gpu.rates.hbm_Bps == pytest.approx(0.8 * 2.039e12)
    assert 22e9 <= gpu.rates.pcie_h2d_Bps <= 24e9  # ShadowKV's value fetch
    assert 22e9 <= gpu.rates.gather_Bps(8 * 128 * 2) <= 24e9  # whose rows are chunks of 8 tokens
    # ShadowKV's top-k over 24 x 8 x 15,360 landmarks: 0.14 to 0.16 ms.
    assert 0.14e-3 <= 24 * 8 * 15_360 / gpu.rates.topk_elements_per_s <= 0.16e-3


@pytest.mark.parametrize(("tokens", "published_s"), [(10e3, 0.976), (50e3, 8.529), (100e3, 24.883), (1e6, 1765.6)])
def test_a100_prefills_llama_3_8b_as_minference_measured(tokens: float, published_s: float) -> None:
    rates = load_gpu("a100-80g-sxm@eager").rates
    linear_flops = 2 * 6.98e9 * tokens  # the weights of 32 layers
    attention_flops = 32 * 2 * 2 * 32 * 128 * tokens**2 / 2  # layers, QK and PV, 2 FLOP, heads, head_dim, causal
    predicted_s = linear_flops / rates.flops("bf16") + attention_flops / rates.attention_flops
    assert predicted_s == pytest.approx(published_s, rel=0.07)


def test_parameter_sets_of_the_h200() -> None:
    peak, usual, measured = (load_gpu(f"h200-sxm{suffix}").rates for suffix in ("@datasheet", "@eager", "@measured"))
    assert peak.hbm_Bps == 4.8e12
    assert load_gpu("h200-sxm").parameter_set == "serving"
    assert measured.flops("bf16") == 715.4e12
    assert measured.gather_Bps(256) == 29.78e9
    assert measured.pcie_h2d_Bps == 55.46e9
    assert measured.flops("fp32") == usual.flops("fp32")  # not measured: that of the set before
    assert measured.nvlink_latency_s == usual.nvlink_latency_s > peak.nvlink_latency_s == 0
    assert measured.launch_s == 1.118e-6


@pytest.mark.parametrize("asked", ["", "@achievable", "@eager"])
def test_the_former_name_of_a_set_is_read_with_a_note(asked: str, tmp_path: Path) -> None:
    today = load_gpu(user_gpu(tmp_path) + "@eager")
    gpu = load_gpu(user_gpu(tmp_path, ("\neager:", "\nachievable:"), ("  eager", "  achievable")) + asked)
    assert gpu.parameter_set == "eager"
    assert gpu.rates == today.rates
    assert gpu.sources == today.sources
    assert len(gpu.notes) == 1
    assert "achievable is called eager now" in gpu.notes[0]
    assert today.notes == ()
    assert load_gpu("h100-sxm@achievable").notes


def test_a_file_takes_kernels_of_a_gpu_that_it_is_like(tmp_path: Path) -> None:
    like = ("measured:\n", "serving:\n  kernels: {like: h100-sxm, products: 0.5}\nmeasured:\n")
    path = user_gpu(tmp_path, like)
    assert load_gpu(path).parameter_set == "serving"
    rows = {"m": 8192, "n": 8192, "k": 8192, "dtype": "bf16"}
    share = 2 * 8192**3 / 100e12 / load_gpu(path).kernels.gemm_s(**rows)
    assert 0.35 <= share <= 0.5  # half of what the H100 reaches of its own peak
    assert load_gpu(f"{path}@measured").kernels.gemm_s(**rows) == load_gpu(path).kernels.gemm_s(**rows)
    for other, message in (("t4", "has no constants of its own"), ("h100", "unknown GPU of kernels.like 'h100'")):
        with pytest.raises(ValueError, match=message):
            load_gpu(user_gpu(tmp_path, (like[0], like[1].replace("h100-sxm", other))))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("gemm", "bf16", "hbm"), 1.2, r"hbm=1.2: Input should be less than or equal to 1"),
        (("gemm", "bf16", "hmb"), 0.9, r"hmb'; did you mean 'hbm'\?"),
        (("gemm", "bf16", "start_s"), True, r"start_s=True: must be a number"),
        (("gemm", "bf16", "tiles"), [], r"tiles must have one without most_rows"),
        (("gemm", "fp7"), None, r"gemm has an unknown dtype 'fp7'; known: bf16"),
        (("elementwise", "hbm"), float("nan"), r"elementwise.hbm=nan"),
        (("like",), "h100-sxm", r"unknown key"),
    ],
)
def test_errors_in_constants_name_the_key_and_the_rule(
    path: tuple[str, ...], value: object, message: str, tmp_path: Path
) -> None:
    document = yaml.safe_load((files("kvsim") / "catalogue" / "gpus" / "h100-sxm.yaml").read_text(encoding="utf-8"))
    place = document["serving"]["kernels"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = place["bf16"] if value is None else value
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(ValueError, match=message):
        load_gpu(str(tmp_path / "mine.yaml"))


def test_a_set_falls_back_figure_by_figure(tmp_path: Path) -> None:
    path = user_gpu(tmp_path)
    usual, measured = load_gpu(path), load_gpu(f"{path}@measured")
    assert usual.name == "mine"
    assert usual.rates.hbm_Bps == 0.5e12
    assert usual.rates.matmul_flops == (("bf16", 40e12), ("fp32", 4e12))
    assert usual.rates.gather_curve == ((256, 8e9), (1024, 16e9))
    assert usual.rates.elementwise_Bps == 1e12
    assert dict(usual.sources) == {**dict.fromkeys(RATES, "a page"), "hbm_Bps": "a paper", "matmul_flops": "a paper",
                                   "gather_curve": "a paper", "launch_s": "a stopwatch"}  # fmt: skip
    assert measured.rates.matmul_flops == (("bf16", 45e12), ("fp32", 4e12))
    assert measured.rates.pcie_h2d_Bps == 20e9


def test_curves_at_and_between_their_points() -> None:
    curve = ((256, 10.0), (1024, 20.0), (4096, 50.0))
    assert [interpolate(curve, row) for row in (1, 256, 1024, 4096, 10**9)] == [10, 10, 20, 50, 50]
    assert interpolate(curve, 512) == pytest.approx(15)  # half way in the logarithm
    assert interpolate(curve, 2048) == pytest.approx(35)


@given(st.integers(1, 10**6))
def test_curves_stay_between_their_neighbours(row_bytes: int) -> None:
    curve = ((256, 10.0), (1024, 20.0), (4096, 50.0))
    value = interpolate(curve, row_bytes)
    assert 10 <= value <= 50
    assert value <= interpolate(curve, row_bytes + 1) + 1e-9
    assert math.isfinite(value)


def test_hosts() -> None:
    desktop, node = load_host("desktop-i9-10900x"), load_host("ddr5-dual-xeon")
    assert desktop.ddr_Bps < 4 * 8 * 2933e6  # four channels of 8 bytes
    assert node.ddr_bytes == 2 * 2**40
    assert load_host("h200-vm").random_Bps(2048) == 25.82e9
    assert node.random_Bps(512) == pytest.approx(0.75 * node.ddr_Bps)  # 64, 512, 4096: half way in the logarithm


def test_a_chip_without_a_type_computes_in_another() -> None:
    """Weight-only formats multiply in 16 bits; a T4 has no bf16, and engines serve in fp16 there."""
    t4, h100 = load_gpu("t4@datasheet").rates, load_gpu("h100-sxm@datasheet").rates
    assert t4.product_flops("bf16") == t4.product_flops("int4") == t4.flops("fp16") == 65e12
    assert t4.product_flops("int8") == 130e12
    assert h100.product_flops("nvfp4") == h100.product_flops("mxfp4") == h100.flops("bf16")
    assert h100.product_flops("mxfp8") == h100.flops("fp8") == 1978.9e12


def test_a_missing_dtype_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="no GEMM rate for dtype 'bf16'; it has fp16, int8, fp32"):
        load_gpu("t4").rates.flops("bf16")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100-sx", r"unknown GPU 'h100-sx'; did you mean 'h100-sxm'\? known: h100-sxm, "),
        ("h100-sxm@serves", r"unknown parameter set 'serves'; did you mean 'serving'\?"),
        ("h100-sxm@measured", r"GPU 'h100-sxm' has no parameter set 'measured'; it has datasheet, eager, serving"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_gpu(name)


def test_a_run_on_a_chip_without_its_dtype_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is simulated; what stands in for it would be 16 or 32 bits."""
    gpu = user_gpu(
        tmp_path,
        ("{bf16: 100e12, fp32: 10e12}", "{fp8: 200e12}"),
        ("{bf16: 45e12}", "{fp8: 45e12}"),
        ("memory_bytes: 1000", "memory_bytes: 80000000000"),
    )
    asked = ["--model", "llama-3.1-8b", "--policy", "full", "--gpu", gpu]
    for command in (["simulate", "--trace", "azure-2023-code", "--limit", "2"], ["explain"]):
        assert main([*command, *asked]) == 2
        error = capsys.readouterr().err
        assert error == (
            "error: this GPU has no GEMM rate for dtype 'bf16'; it has fp8; give its file a rate for it in "
            "matmul_flops, or choose another --weight-dtype\n"
        )


def test_unknown_host_lists_the_nearest_first() -> None:
    with pytest.raises(ValueError, match=r"unknown host 'ddr5'; .*known: ddr5-dual-xeon"):
        load_host("ddr5")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hbm_Bps: 1e12", "hbm_Bps: -1", r"mine\.yaml: datasheet\.hbm_Bps=-1: must be greater than 0"),
        ("hbm_Bps: 50%", "hbm_bps: 50%", r"unknown key 'eager\.hbm_bps'; did you mean 'hbm_Bps'\?"),
        ("hbm_Bps: 1e12", "hbm_Bps: fast", r"datasheet\.hbm_Bps='fast': must be a number, or a percentage"),
        ("hbm_Bps: 1e12", "hbm_Bps: .inf", r"datasheet\.hbm_Bps=inf: must be a finite number"),
        ("hbm_Bps: 1e12", "hbm_Bps: 90%", r"hbm_Bps is a percentage, but the datasheet gives no absolute"),
        ("  hbm_Bps: 1e12\n", "", r"mine\.yaml: (hbm_Bps is a percentage|datasheet\.hbm_Bps is missing)"),
        ("sync_s: 0", "sync_s: -1e-6", r"datasheet\.sync_s='-1e-6': must be 0 or more"),
        ("launch_s: 2e-6", "sync_s: 10%", r"sync_s is a percentage of the datasheet's 0; write the figure itself"),
        ("gather_sm_share: 0", "gather_sm_share: 5", r"gather_sm_share=5: must be between 0 and 1"),
        ("memory_bytes: 1000\n", "", r"mine\.yaml: memory_bytes is missing"),
        ("memory_bytes: 1000", "memory_bytes: 0", r"memory_bytes=0: Input should be greater than 0"),
        ("sms: 10", "sms: 10\ndevice_bytes: 1001", r"device_bytes=1001 exceeds memory_bytes=1000"),
        ("\neager:", "\nachievable: {}\neager:", r"achievable is the former name of eager; keep one of them"),
        (
            "hbm_Bps: 50%",
            "hbm_Bps: 101%",
            r"eager\.hbm_Bps=1\.01e\+12 is faster than the datasheet's 1e\+12, which",
        ),
        ("hbm_Bps: 50%", "nvlink_Bps: 1", r"eager\.nvlink_Bps=1 is faster than the datasheet's 0"),
        ("matmul_flops: 40%", "matmul_flops: {fp32: 11e12}", r"eager\.matmul_flops\.fp32=1\.1e\+13 is faster than"),
        ("256: 25%", "256: 1e12", r"eager\.gather_curve\.256=1e\+12 is faster than"),
        ("eager.launch_s: a", "eager.lunch_s: a", r"sources\.eager\.lunch_s names no figure"),
        ("fp32: 10e12}", "fp32: 10e12", r"mine\.yaml is not YAML: "),
    ],
)
def test_faults_in_a_users_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_gpu(user_gpu(tmp_path, (old, new)))


def test_faults_in_a_users_host(tmp_path: Path) -> None:
    path = tmp_path / "host.yaml"
    path.write_text("gpus_max: 1\nddr_Bps: -3\nddr_byte: 5\n")
    with pytest.raises(
        ValueError, match=r"host\.yaml: .*ddr_bytes is missing; ddr_Bps=-3: Input should be greater"
    ) as error:
        load_host(str(path))
    assert "unknown key 'ddr_byte'; did you mean 'ddr_bytes'?" in str(error.value)
