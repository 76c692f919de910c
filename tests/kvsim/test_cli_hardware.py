"""`kvsim hardware` on the catalogue, and on a user's files whose every figure the test knows."""

import json
from pathlib import Path

import pytest

from kvsim.__main__ import main

GPU = """
memory_bytes: 8589934592
sms: 10
datasheet:
  hbm_Bps: 1.0e+12
  matmul_flops: {bf16: 2.0e+14}
  attention_flops: 1.0e+14
  elementwise_Bps: 9.0e+11
  topk_elements_per_s: 2.0e+10
  launch_s: 5.0e-6
  sync_s: 1.5e-5
  pcie_h2d_Bps: 3.0e+10
  pcie_d2h_Bps: 3.0e+10
  pcie_latency_s: 1.0e-5
  gather_curve: {256: 1.0e+10, 4096: 2.5e+10}
  gather_sm_share: 0.25
  nvlink_Bps: 0
  nvlink_latency_s: 0
measured:
  hbm_Bps: 80%
sources: {memory_bytes: printed on the card, datasheet: the vendor, measured: a stopwatch}
"""

HOST = """
gpus_max: 2
ddr_bytes: 68719476736
ddr_Bps: 9.0e+10
cpu_cores: 10
cpu_flops: 1.0e+12
random_curve: {256: 1.0e+10}
copy_Bps: 3.0e+10
nvme_bytes: 0
nvme_read_Bps: 0
nvme_write_Bps: 0
nvme_latency_s: 0
nic_Bps: 0
nic_latency_s: 0
gpus_per_switch: 2
switch_Bps: 3.0e+10
sources: {ddr_Bps: 4 channels of DDR4-2933}
"""


def out_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Standard output of a command that must succeed and say nothing else."""
    code = main(["hardware", *args])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


@pytest.fixture
def gpu_file(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(GPU, encoding="utf-8")
    return str(path)


def test_parameter_sets_stand_beside_each_other(gpu_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split() for line in out_of(capsys, "show", gpu_file).splitlines()]
    assert ["figure", "datasheet", "measured"] in rows
    assert ["hbm_Bps", "1", "TB/s", "800", "GB/s"] in rows  # 80 % of the datasheet
    assert ["launch_s", "5", "us", "5", "us"] in rows  # measured says nothing, so the datasheet's holds
    assert ["matmul_flops", "bf16", "200", "TFLOP/s", "200", "TFLOP/s"] in rows
    assert ["gather_curve", "at", "4,096", "B", "25", "GB/s", "25", "GB/s"] in rows
    assert ["gather_sm_share", "25%", "25%"] in rows
    assert ["hbm_Bps:", "a", "stopwatch"] in rows


def test_one_parameter_set_alone(gpu_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(out_of(capsys, "show", f"{gpu_file}@measured", "--json"))
    assert list(shown["rates"]) == ["measured"]
    assert shown["rates"]["measured"]["hbm_Bps"] == pytest.approx(8e11)
    assert shown["rates"]["measured"]["matmul_flops"] == {"bf16": 2e14}
    assert shown["rates"]["measured"]["gather_curve"] == [[256, 1e10], [4096, 2.5e10]]
    assert (shown["name"], shown["memory_bytes"], shown["sms"]) == ("mine", 8 * 2**30, 10)
    assert shown["sources"]["measured"]["hbm_Bps"] == "a stopwatch"


def test_a_host_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(HOST, encoding="utf-8")
    rows = [line.split() for line in out_of(capsys, "show", str(path), "--host").splitlines()]
    assert ["ddr_bytes", "64", "GiB"] in rows
    assert ["random_curve", "at", "256", "B", "10", "GB/s"] in rows
    assert ["ddr_Bps:", "4", "channels", "of", "DDR4-2933"] in rows
    shown = json.loads(out_of(capsys, "show", str(path), "--host", "--json"))
    assert (shown["schema_version"], shown["ddr_bytes"]) == (1, 64 * 2**30)


def test_every_listed_device_can_be_shown_with_a_source_for_each_figure(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(out_of(capsys, "list", "--json"))
    assert {gpu["name"] for gpu in listed["gpus"]} >= {"a100-80g-sxm", "h100-sxm", "h200-sxm", "rtx-4090"}
    for gpu in listed["gpus"]:
        shown = json.loads(out_of(capsys, "show", gpu["name"], "--json"))
        assert list(shown["rates"]) == gpu["parameter_sets"]
        assert all(shown["rates"][one].keys() <= shown["sources"][one].keys() for one in shown["rates"])
    for host in listed["hosts"]:
        shown = json.loads(out_of(capsys, "show", host["name"], "--json"))
        assert shown.keys() - shown["sources"].keys() == {"schema_version", "name", "sources"}
    table = out_of(capsys, "list")
    assert all(device["name"] in table for device in listed["gpus"] + listed["hosts"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h200-smx", "error: unknown GPU or host 'h200-smx'; did you mean 'h200-sxm'? known: h200-sxm, "),
        ("h200-smx@measured", "error: unknown GPU or host 'h200-smx'; did you mean 'h200-sxm'? known: "),
        ("no/such.yaml", "error: no/such.yaml: No such file or directory"),
        ("t4@measured", "error: catalogue GPU 't4' has no parameter set 'measured'; it has datasheet"),
    ],
)
def test_an_unknown_device_lists_the_known(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware", "show", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1
