"""Hosts whose files draw their PCIe switches: what they amount to, and topologies that cannot be."""

from pathlib import Path

import pytest

from kvsim.__main__ import main
from kvsim.hardware.catalogue import load_host

HOST = """
gpus_max: 4
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
"""
PAIRS = "a: {under: root, gpus: [0, 1], Bps: 2.5e+10}, b: {under: root, gpus: [2, 3], Bps: 2.5e+10}"

# The last one may have fewer.
THREE_AND_ONE = """{
  b: {under: top, gpus: [3], Bps: 2.5e+10}, top: {under: root, Bps: 2.5e+10},
  a: {under: root, gpus: [0, 1, 2], Bps: 2.5e+10},
}"""


def host_file(folder: Path, switches: str) -> Path:
    path = folder / "server.yaml"
    path.write_text(f"{HOST}switches: {switches}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("switches", "per_switch"),
    [
        (f"{{{PAIRS}}}", 2),
        (THREE_AND_ONE, 3),
        (f"{{{PAIRS.replace('root', 'top')}, top: {{under: root, Bps: 5.0e+10}}}}", 2),
    ],
)
def test_a_tree_amounts_to_its_lowest_switches(switches: str, per_switch: int, tmp_path: Path) -> None:
    host = load_host(str(host_file(tmp_path, switches)))
    assert (host.gpus_per_switch, host.switch_Bps) == (per_switch, 2.5e10)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (
            "{a: {under: b, Bps: 1.0}, b: {under: c, Bps: 1.0}, c: {under: a, Bps: 1.0}}",
            "switches: a -> b -> c -> a is a ring without a way to the root; put one under root",
        ),
        ("{a: {under: a, gpus: [0, 1, 2, 3], Bps: 1.0}}", "switches: a -> a is a ring without a way to the root"),
        (
            f"{{{PAIRS.replace('[2, 3]', '[2]')}}}",
            "switches: GPU 3 hangs on no switch, and gpus_max=4 counts it; put it on one",
        ),
        (f"{{{PAIRS.replace('[2, 3]', '[2, 3, 4]')}}}", "switches: GPU 4 does not exist: gpus_max=4 numbers them"),
        (f"{{{PAIRS.replace('[2, 3]', '[1, 2, 3]')}}}", "switches: GPU 1 hangs on two switches; leave it on one"),
        (
            f"{{{PAIRS}, c: {{under: root, Bps: 1.0}}}}",
            "switches: c has neither GPUs nor switches below it; it needs one or the other",
        ),
        (
            "{a: {under: rot, gpus: [0, 1, 2, 3], Bps: 1.0}}",
            "switches: unknown switch above 'a', 'rot'; did you mean 'root'? known: root, a",
        ),
        (
            f"{{{PAIRS.replace('root', 'top')}, top: {{under: root, Bps: 4.0e+10}}}}",
            "switches: top: Bps=4e+10 is below the 5e+10 of the switches under it; only the lowest switches may",
        ),
        (
            f"{{{PAIRS.replace('[0, 1]', '[0]').replace('[2, 3]', '[1, 2, 3]')}}}",
            "switches: the switch with GPUs [1, 2, 3] differs from that with [0]; all must have equally many",
        ),
        ("{root: {under: root, gpus: [0, 1, 2, 3], Bps: 1.0}}", "switches: 'root' is the root complex, above all"),
        (
            f"{{{PAIRS.replace('gpus: [2, 3]', 'gpu: [2, 3]')}}}",
            "switches: unknown key 'b.gpu'; did you mean 'gpus'?",
        ),
        (f"{{{PAIRS}}}\nswitch_Bps: 1.0", "switch_Bps follows from switches; leave one of them out"),
        ("[a, b]", "switches must be a mapping of names"),
    ],
)
def test_topologies_that_cannot_be(
    switches: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = host_file(tmp_path, switches), tmp_path / "out"
    args = ("--trace", "azure-2023-code", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--host", str(path))
    assert main(["simulate", *args, "--out", str(out)]) == 2
    shown, error = capsys.readouterr()
    assert (shown, error.count("\n")) == ("", 1)
    assert error.startswith(f"error: {path}: {message}")
    assert not out.exists()
