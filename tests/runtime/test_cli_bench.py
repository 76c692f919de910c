"""`kvsim bench decode`: rows for policies and caches, what the simulator says beside them, and what it refuses."""

import json

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvsim.__main__ import main  # noqa: E402
from kvsim.cli.app import app  # noqa: E402
from kvsim.explain.costs import Explainer  # noqa: E402
from kvsim.hardware.catalogue import load_gpu, load_host  # noqa: E402
from kvsim.models import load_model  # noqa: E402
from policies import parse_policy  # noqa: E402

ASKED = ["bench", "decode", "--context", "200", "--steps", "3", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(app, [*ASKED, *arguments], catch_exceptions=False)


def test_rows_say_what_was_measured_and_what_is_predicted(tiny_llama, tmp_path):
    out = tmp_path / "bench.json"
    asked = ["--model", str(tiny_llama), "--policy", "full", "--policy", "offload-all", "--baseline", "hf-dynamic"]
    more = ["--batch", "1,2", "--generate-steps", "2", "--gpu", "h200-sxm@measured", "--host", "h200-vm"]
    got = run(*asked, *more, "--out", str(out), "--json")
    assert got.exit_code == 0
    document = json.loads(got.stdout)
    assert json.loads(out.read_text()) == document
    rows = {(row["cache"], row["batch"]): row for row in document["rows"]}
    assert list(rows) == [(name, n) for n in (1, 2) for name in ("full", "offload-all", "hf-dynamic")]
    model, gpu, host = load_model(str(tiny_llama / "config.json")), load_gpu("h200-sxm@measured"), load_host("h200-vm")
    prompt = 200 - 3 - 2 - 8
    for (name, batch), row in rows.items():
        assert row["prompt_tokens"] == prompt
        assert len(row["tpot_each_s"]) == 3
        assert row["tpot_s"] == pytest.approx(sum(row["tpot_each_s"]) / 3)
        if name == "hf-dynamic":
            assert row["ttft_s"] is None
            assert "predicted_tpot_s" not in row
            continue
        assert row["generate_tpot_s"] > 0
        predicted = Explainer(parse_policy(name), model, gpu, host, utilization=1.0).step_s(prompt + 8, batch)
        assert row["predicted_tpot_s"] == predicted
        assert row["tpot_error"] == pytest.approx(predicted / row["tpot_s"] - 1)
        assert 0 < row["floor_tpot_s"] < predicted
    # Each step fetches what the layers held before it: 3 layers of 2 KV heads of 8, K and V in fp32.
    steps = range(prompt, prompt + 3 + 4)
    fetched = sum(3 * 2 * 2 * 8 * 4 * tokens for tokens in steps) / len(steps)
    assert rows["offload-all", 2]["moved_bytes_per_token"]["ddr->hbm"] == 2 * fetched
    assert rows["full", 1]["replayed_steps"] == 0  # there are no graphs on a CPU
    assert "takes lengths from the host" in next(iter(rows["offload-all", 1]["eager"]))


def test_a_gpu_that_is_not_known_is_not_predicted(tiny_llama):
    got = run("--model", str(tiny_llama), "--policy", "full")
    assert got.exit_code == 0
    assert "no prediction" in got.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", "11"], "--context 11 leaves no prompt before 11 tokens"),
        (["--context", "0"], "--context '0' must name numbers of at least 1"),
        (["--baseline", "hf-statick"], "hf-static"),
        (["--policy", "fool"], "full"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--gpu", "h2000"], "h2000"),
        (["--dtype", "fp7", "--model", "llama-3.2-1b"], "fp7"),
    ],
)
def test_bad_input_is_one_clear_error(tiny_llama, capsys, arguments, words):
    given = [] if "--model" in arguments else ["--model", str(tiny_llama)]
    assert main([*ASKED, *given, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_kernels_and_shapes_need_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", "kernels"]) == 2
    assert "torch sees none" in capsys.readouterr().err
    assert main(["bench", "decode"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_kernels_are_timed():
    got = CliRunner().invoke(app, ["bench", "kernels", "--json"], catch_exceptions=False)
    rows = json.loads(got.stdout)["rows"]
    assert {row["kernel"] for row in rows} >= {"attention of one token", "gather from pinned memory", "keys rebuilt"}
    for row in rows:  # nothing is faster than the memory that it reads: 4.8 TB/s, and PCIe 5.0 of 16 lanes
        assert row["nbytes"] / row["seconds"] < {"hbm": 4.8e12, "pcie": 64e9}[row["link"]]
