"""The examples run, and show what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvsim.__main__ import main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*command: str) -> str:
    """What the interpreter prints on standard output when it must succeed and say nothing else."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(EXAMPLES)))}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_replay_trace() -> None:
    out = run("examples/replay_trace.py", "20")
    assert "20 of 20 requests finished" in out
    assert {"gpu0.hbm", "gpu3.hbm", "host0.ddr"} <= {line.split(":")[0] for line in out.splitlines()}


def test_sweep_gpus() -> None:
    rows = [line.split() for line in run("examples/sweep_gpus.py", "20").splitlines()]
    assert [row[0] for row in rows] == ["l40s", "a100-80g-sxm", "h100-sxm", "h200-sxm"]
    goodput = [float(row[1]) for row in rows]
    assert 0 <= goodput[0] <= goodput[1] <= goodput[2] <= goodput[3]


def test_compare_policies() -> None:
    header, *rows = run("examples/compare_policies.py", "20").splitlines()
    assert header.count("rate x") == 3
    assert [row.split()[0].split(":")[0] for row in rows] == [
        "full",
        "sink-window",
        "shadowkv",
        "full@below=8k+shadowkv",
    ]
    assert all(len(row.split()) == 4 for row in rows)


def test_new_policy_stores_less_the_fewer_its_bits() -> None:
    peaks = [float(gib) for gib in re.findall(r"([\d.]+) GiB", run("examples/new_policy.py", "20"))]
    weights = 8_030_261_248 * 2 / 2**30
    kv_full, kv_int8, kv_int4 = (peak - weights for peak in peaks)
    # A row of 128 elements: 256 bytes in bf16; in int8 128 and a 2-byte scale; in int4 64 and 4 bytes for each group of
    # 64 elements. Less frees memory sooner, so that batches are not of the same size.
    assert kv_int8 / kv_full == pytest.approx(130 / 256, rel=0.15)
    assert kv_int4 / kv_full == pytest.approx(72 / 256, rel=0.15)


def test_new_policy_is_known_to_the_command_line_by_its_module() -> None:
    names = [f"new_policy:QuantizedCache:dtype={dtype}" for dtype in ("int8", "fp8")]
    where = ("--trace", "azure-2023-code", "--limit", "20", "--model", "llama-3.1-8b", "--gpu", "l40s")
    command = ("-m", "kvsim", "compare", *where, "--policy", names[0], "--policy", names[1], "--json")
    runs = json.loads(run(*command))["runs"]
    assert [run["inputs"]["policy"] for run in runs] == names
    assert [run["requests"]["finished"] for run in runs] == [20, 20]


def test_generate_under_a_policy() -> None:
    pytest.importorskip("torch")
    out = run("examples/generate.py")
    # A token's keys and values of a layer: 2 x 2 heads x 8 x 4 bytes = 128. Room for 520 tokens on four layers, and two
    # staging buffers; down go the prompt and 19 tokens that are fed back, up comes what was there before each of them.
    assert "holds 266,240 bytes in ddr, 133,120 bytes in hbm" in out
    assert f"moved {4 * 128 * sum(range(500, 519)):,} bytes ddr->hbm" in out
    assert f"moved {4 * 128 * 519:,} bytes hbm->ddr" in out
    assert "20 of 20 tokens as without the policy" in out


def test_predicted_bytes() -> None:
    pytest.importorskip("torch")
    out = run("examples/predicted_bytes.py")
    links = re.findall(r"predicted ([\d,]+), moved ([\d,]+), replayed ([\d,]+)", out)
    assert len(links) == 4
    assert all(moved == replayed for _, moved, replayed in links)
    # Of shadowkv's fetches alone data decide: they are predicted from a published hit rate.
    assert [predicted == moved for predicted, moved, _ in links] == [True, True, False, True]


def test_a_policy_of_ones_own_is_simulated_and_run() -> None:
    pytest.importorskip("torch")
    simulated_full, simulated, exact, ddr, hbm = run("examples/own_policy.py", "20").splitlines()
    peaks = [float(re.search(r"([\d.]+) GiB", line)[1]) for line in (simulated_full, simulated)]
    assert peaks[1] < peaks[0]
    assert exact == "tokens as without it: True"
    # 210 tokens of 8 layers with 4 heads of 64 fp32 numbers; in HBM the same of keys, and two layers of staging.
    assert ddr == f"holds {8 * 210 * 1024:,} bytes in ddr"
    assert hbm == f"holds {(8 + 2) * 210 * 1024:,} bytes in hbm"


def test_a_policy_of_ones_own_moves_what_its_plan_says() -> None:
    pytest.importorskip("torch")
    sizes = ("--prompt", "50", "--new", "4", "--json")
    out = run("-m", "kvsim", "validate", "--bytes", "--policy", "own_policy:ValuesOnHost:staging_layers=1", *sizes)
    (row,) = json.loads(out)["policies"]
    assert row["agree"]
    # Two sequences, eight layers: down the prompt and three tokens, up what was there before each of the three.
    token = 2 * 8 * 1024
    assert row["moved_bytes"]["hbm->ddr"] == dict.fromkeys(("runtime", "kvsim", "audit"), token * 53)
    assert row["moved_bytes"]["ddr->hbm"] == dict.fromkeys(("runtime", "kvsim", "audit"), token * (50 + 51 + 52))


def test_schedulers_differ_only_where_requests_wait() -> None:
    head, _, *rest = run("examples/compare_schedulers.py", "40").splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in rest[:3]}
    assert list(rows) == ["fcfs", "priority", "fair"]
    assert rows["fcfs"] == rows["priority"] == rows["fair"]  # four GPUs have time for forty requests
    assert all(len(cells) == head.count("|") - 2 for cells in rows.values())
    clients = [line.split(" | ") for line in rest[6:]]
    assert clients[0][0] == "| client-54"
    assert [len(client) for client in clients] == [5] * len(clients)


def test_the_scenario_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--scenario", str(EXAMPLES / "scenario.yaml"), "--limit", "20", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["inputs"]["policy"].partition(":")[0] for run in runs] == [
        "full",
        "shadowkv",
        "full@below=8000+sink-window",
    ]
    assert {run["inputs"]["counts"]["miss"] for run in runs} == {0.3}
    assert runs[0]["inputs"]["slo"] == {"ttft_s": 10.0, "tpot_s": 0.05}


def test_the_cells_of_the_notebook_run_in_their_order() -> None:
    cells = json.loads((EXAMPLES / "plan.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 7
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    out = run("-c", "\n".join([*code, "print(found.sentence)"])).splitlines()
    assert [line.split()[0] for line in out[:2]] == ["full", "shadowkv:budget_tokens=1024"]
    assert " holds ttft_p99 1 s, tpot_p99 50 ms " in out[2]
