"""Constants fitted to records of a server: those that the server had come back, or the records are refused in words."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_server import serving
from simulated import HOST, MODEL, setup, trace

import kvsim
from kvsim.__main__ import main
from kvsim.hardware.catalogue import load_gpu
from kvsim.observed.calibration import calibrated
from kvsim.run.simulate import Setup, simulate
from policies import Full
from traces import Trace

GPU = load_gpu("h100-sxm")
FLEET = Setup(model=MODEL, policy=Full(), gpu=GPU, host=HOST)
TRUE = {"kernel_slowdown": 1.6, "iteration_overhead_s": 0.004, "request_overhead_s": 0.05}
DEPLOYED = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm"]


def requests(n: int = 60, *, span_s: float = 30.0, seed: int = 1) -> Trace:
    """Prompts from a hundred to ten thousand tokens, at random times."""
    rng = np.random.default_rng(seed)
    prompts = np.exp(rng.uniform(np.log(100), np.log(10_000), n)).astype(int)
    return trace(np.sort(rng.uniform(0, span_s, n)), prompts, rng.integers(2, 60, n))


def latencies(asked: Trace, one: Setup) -> tuple[np.ndarray, np.ndarray]:
    """Of each request, from sending to the first token and to the last."""
    found = simulate(asked, one).requests
    return found["first_token_s"] - found["arrival_s"], found["finish_s"] - found["arrival_s"]


def written(path: Path, asked: Trace, first_s: np.ndarray, last_s: np.ndarray) -> str:
    """Records as `kvsim observe` writes them."""
    rows: list[dict[str, Any]] = [{"kvsim_observe": 1}]
    rows += [
        {
            "request": i,
            "status": "finished",
            "sent_s": asked.arrival_s[i],
            "first_token_s": asked.arrival_s[i] + first_s[i],
            "last_token_s": asked.arrival_s[i] + last_s[i],
            "prompt_tokens": int(asked.prompt_tokens[i]),
            "output_tokens": int(asked.output_tokens[i]),
        }
        for i in range(len(asked))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a server with TRUE constants, whose latencies scatter by 5 %."""
    asked, rng = requests(), np.random.default_rng(2)
    first_s, last_s = latencies(asked, replace(FLEET, **TRUE))
    later_s = (last_s - first_s) * rng.lognormal(0, 0.05, len(asked))
    first_s = first_s * rng.lognormal(0, 0.05, len(asked))
    return written(tmp_path_factory.mktemp("records") / "seen.jsonl", asked, first_s, first_s + later_s)


@pytest.fixture(scope="module")
def calibration(records: str) -> dict[str, Any]:
    return calibrated(records, FLEET, {})


def test_the_server_s_constants_come_back(calibration: dict[str, Any]) -> None:
    found = calibration["constants"]
    assert found["kernel_slowdown"] == pytest.approx(1.6, rel=0.06)
    assert found["iteration_overhead"] == pytest.approx(0.004, abs=0.0008)
    assert found["request_overhead"] == pytest.approx(0.05, abs=0.005)
    assert (calibration["requests"], calibration["fitted"], calibration["held_out"]) == (60, 40, 20)
    for name in ("kernel_slowdown", "iteration_overhead", "request_overhead"):
        assert 0 < calibration["standard_errors"][name] < 0.2 * found[name]


def test_the_error_left_is_the_scatter(calibration: dict[str, Any]) -> None:
    """Of a lognormal with sigma 5 % half is within 3.4 %; nothing before the fit was within 30 %."""
    left = calibration["error_left"]
    assert left["tpot_s"]["median"] == pytest.approx(0.034, abs=0.02)
    assert left["ttft_s"]["median"] < 0.10  # which iteration a prompt just misses is chance as well
    assert min(left["ttft_s"]["median_before"], left["tpot_s"]["median_before"]) > 0.3
    assert abs(left["tpot_s"]["bias"]) < 0.04
    for name in ("ttft_s", "tpot_s"):
        assert left[name]["simulated_p50_s"] == pytest.approx(left[name]["measured_p50_s"], rel=0.15)


def test_it_is_measured_on_requests_that_no_fit_saw(records: str, calibration: dict[str, Any], tmp_path: Path) -> None:
    """Other latencies of every third request leave the constants as they are, and change the error."""
    lines = Path(records).read_text(encoding="utf-8").splitlines()
    for i in range(2, 60, 3):
        row = json.loads(lines[1 + i])
        row["first_token_s"] += 1.0
        row["last_token_s"] += 1.0
        lines[1 + i] = json.dumps(row)
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(lines), encoding="utf-8")
    found = calibrated(str(other), FLEET, {})
    assert found["constants"] == calibration["constants"]
    assert found["error_left"]["ttft_s"]["median"] > 0.5
    assert found["error_left"]["tpot_s"] == pytest.approx(calibration["error_left"]["tpot_s"])
    assert any("still" in words and "TTFT" in words for words in found["warnings"])


def test_a_constant_that_is_stated_stays(records: str) -> None:
    found = calibrated(records, replace(FLEET, kernel_slowdown=1.6), {"kernel_slowdown": 1.6})
    assert found["constants"]["kernel_slowdown"] == 1.6
    assert found["stated"] == ["kernel_slowdown"]
    assert found["constants"]["iteration_overhead"] == pytest.approx(0.004, abs=0.0004)
    assert "kernel slowdown 1.6 (stated)" in found["words"]


def sent(asked: Trace, tmp_path: Path) -> str:
    """The trace in a file, for `kvsim observe`."""
    import traces

    path = tmp_path / "sent.jsonl"
    traces.write(asked, path)
    return str(path)


def observed(asked: Trace, times: Any, tmp_path: Path) -> str:
    """The records of a real server on this machine whose tokens come at stated times, by the length of a prompt."""
    out = tmp_path / "seen.jsonl"
    with serving(lambda _number, prompt, output: times(prompt, output)) as server:
        assert main(["observe", server.url, "--trace", sent(asked, tmp_path), "--out", str(out)]) == 0
    return str(out)


def test_a_real_server_with_known_delays(tmp_path: Path) -> None:
    """A first token after 60 ms and 40 us a prompt token, others 30 ms apart, one request at a time.

    The simulator's own lone requests say which constants that is: the slope of TTFT by prompt tokens is the kernels',
    what remains of a TPOT the host's, and what remains of a TTFT the network's.
    """
    lengths = np.unique(np.geomspace(200, 7000, 30).astype(int))
    asked = trace(0.5 * np.arange(len(lengths)), np.random.default_rng(3).permutation(lengths), 4)
    first_s, between_s, token_s = 0.06, 0.03, 4e-5
    path = observed(
        asked, lambda prompt, output: [first_s + token_s * prompt + i * between_s for i in range(output)], tmp_path
    )
    found = calibrated(path, FLEET, {})
    left = found["error_left"]
    assert left["tpot_s"]["median"] < 0.08
    assert left["ttft_s"]["median"] < 0.08

    def lone(prompt: int, one: Setup = FLEET) -> np.ndarray:
        ttft_s, e2e_s = latencies(trace([0.0], prompt, 4), one)
        return np.array([ttft_s[0], (e2e_s[0] - ttft_s[0]) / 3])

    short, long = lone(1000), lone(6000)
    slowdown = token_s * 5000 / (long - short)[0]
    constants = found["constants"]
    assert constants["kernel_slowdown"] == pytest.approx(slowdown, rel=0.1)
    host_s = between_s - slowdown * short[1]
    assert constants["iteration_overhead"] == pytest.approx(host_s, abs=0.1 * between_s)
    network_s = first_s + token_s * 1000 - slowdown * short[0] - host_s
    assert constants["request_overhead"] == pytest.approx(network_s, rel=0.15)
    fitted = replace(FLEET, **{name: constants[name.removesuffix("_s")] for name in TRUE})
    for prompt in (500, 5000):
        assert lone(prompt, fitted) == pytest.approx([first_s + token_s * prompt, between_s], rel=0.1)


def test_a_real_server_whose_latencies_are_simulated(tmp_path: Path) -> None:
    """Its requests wait for each other as those of a server with known constants would: these come back."""
    true = {"kernel_slowdown": 4.0, "iteration_overhead_s": 0.02, "request_overhead_s": 0.2}
    rng = np.random.default_rng(4)
    prompts = rng.permutation(np.unique(np.geomspace(150, 6000, 36).astype(int)))
    asked = trace(np.sort(rng.uniform(0, 9, len(prompts))), prompts, rng.integers(4, 12, len(prompts)))
    first_s, last_s = latencies(asked, replace(FLEET, **true))
    row = {int(prompt): i for i, prompt in enumerate(prompts)}
    path = observed(
        asked, lambda prompt, output: np.linspace(first_s[row[prompt]], last_s[row[prompt]], output).tolist(), tmp_path
    )
    found = calibrated(path, FLEET, {})["constants"]
    assert found["kernel_slowdown"] == pytest.approx(4.0, rel=0.12)
    assert found["iteration_overhead"] == pytest.approx(0.02, abs=0.005)
    assert found["request_overhead"] == pytest.approx(0.2, rel=0.15)


def simulated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["simulate", "--trace", "azure-2023-code", "--limit", "40", *DEPLOYED, *words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_run_says_what_it_rests_on(records: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["simulate", "--trace", "azure-2023-code", "--limit", "40", *DEPLOYED, "--calibrate-from", records]
    assert main([*words, "--out", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "serving constants fitted to 40 of 60 requests that kvsim observe recorded: kernel slowdown 1." in printed
    assert "error left on the 20 held out: TTFT" in printed
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    found = summary["inputs"]["calibration"]
    assert summary["inputs"]["kernel_slowdown"] == found["constants"]["kernel_slowdown"]
    assert "error left on the 20 held out" in (out / "report.html").read_text(encoding="utf-8")
    flags = [word for key, value in found["constants"].items() for word in (f"--{key.replace('_', '-')}", str(value))]
    again = simulated(capsys, *flags)  # the same run, from the constants alone
    assert again["ttft_s"] == summary["ttft_s"]
    assert again["tpot_s"] == summary["tpot_s"]
    plain = simulated(capsys)
    assert summary["ttft_s"]["p50"] > plain["ttft_s"]["p50"] + 0.05


def test_records_are_of_full_attention(
    records: str, calibration: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever policy is simulated then."""
    found = simulated(capsys, "--policy", "shadowkv", "--calibrate-from", records)["inputs"]["calibration"]
    assert found["constants"] == calibration["constants"]


def test_a_plan_has_the_constants_of_the_server(records: str, calibration: dict[str, Any]) -> None:
    asked = {"trace": "azure-2023-code", "limit": 30, "model": "llama-3.1-8b", "pools": False, "seeds": 1}
    found = kvsim.plan(**asked, gpu="h100-sxm", slo="ttft_p99=5s", calibrate_from=records).to_dict()
    constants = calibration["constants"]
    assert found["calibration"]["constants"] == constants
    assert f"--kernel-slowdown {constants['kernel_slowdown']}" in found["answer"]["simulate"]
    assert any("held out" in row["source"] and row["kind"] == "fitted" for row in found["sources"])
    with pytest.raises(ValueError, match="2 kinds of GPU; plan with the --gpu that was measured"):
        kvsim.plan(**asked, gpu=["h100-sxm", "l40s"], slo="ttft_p99=5s", calibrate_from=records)


def alike(n: int = 40) -> Trace:
    return trace(np.arange(n) * 3.0, 1000, 20)


def test_requests_that_are_all_alike_are_refused(tmp_path: Path) -> None:
    asked = alike()
    first_s, last_s = latencies(asked, replace(FLEET, **TRUE))
    path = written(tmp_path / "a.jsonl", asked, first_s, last_s)
    with pytest.raises(ValueError, match=r"cannot tell kernel_slowdown and .* apart: their prompts are alike") as told:
        calibrated(path, FLEET, {})
    assert "--kernel-slowdown 1" in str(told.value)
    # With the kernels stated the others are known from one kind of request.
    stated = replace(FLEET, kernel_slowdown=TRUE["kernel_slowdown"])
    found = calibrated(path, stated, {"kernel_slowdown": 1})["constants"]
    assert found["iteration_overhead"] == pytest.approx(0.004, rel=0.02)
    assert found["request_overhead"] == pytest.approx(0.05, rel=0.02)


def test_noise_is_refused(tmp_path: Path) -> None:
    asked, rng = requests(30), np.random.default_rng(5)
    first_s = rng.lognormal(-2, 1.5, len(asked))
    path = written(tmp_path / "a.jsonl", asked, first_s, first_s * rng.lognormal(1, 1.5, len(asked)) + first_s)
    with pytest.raises(ValueError, match="the records cannot tell"):
        calibrated(path, FLEET, {})


@pytest.mark.parametrize(
    ("asked", "one", "given", "words"),
    [
        (requests(23), FLEET, {}, "23 requests finished, too few"),
        (trace(np.arange(30.0), np.arange(30) * 100 + 50, 1), FLEET, {}, "no request has two output tokens"),
        (requests(), FLEET, dict.fromkeys(("kernel_slowdown", "iteration_overhead", "request_overhead")), "all stated"),
        (requests(), setup(gpu=GPU, kv_cache_tokens=2000), {}, "rejects .* state the fleet that was measured"),
    ],
)
def test_records_that_tell_nothing_are_refused(
    asked: Trace, one: Setup, given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    first_s, last_s = latencies(asked, FLEET)
    path = written(tmp_path / "a.jsonl", asked, first_s, last_s)
    with pytest.raises(ValueError, match=words):
        calibrated(path, one, given)


def test_a_file_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--trace", "azure-2023-code", *DEPLOYED, "--calibrate-from"]
    assert main([*words, str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
