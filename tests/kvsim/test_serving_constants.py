"""What a server has beside its kernels: each constant moves latencies by what its words say, in both fidelities."""

import numpy as np
import pytest
from simulated import GPU, setup, trace

from kvsim.__main__ import main
from kvsim.hardware.catalogue import load_gpu
from kvsim.results.summary import Result, summarize
from kvsim.run.simulate import simulate

LONE = trace([0.0], 5000, 11)
SERVED = load_gpu("h100-sxm")


def latencies(result: Result) -> tuple[float, float]:
    """TTFT and TPOT of the first request."""
    columns = result.requests
    first_s, output = columns["first_token_s"][0], columns["output_tokens"][0]
    return first_s - columns["arrival_s"][0], (columns["finish_s"][0] - first_s) / (output - 1)


@pytest.mark.parametrize("fidelity", ["step", "op"])
@pytest.mark.parametrize("gpu", [GPU, SERVED], ids=["eager", "serving"])
def test_the_host_s_part_is_added_to_each_iteration(fidelity, gpu) -> None:
    chunks = 3  # 5,000 tokens in chunks of 2,048
    options = {"gpu": gpu, "fidelity": fidelity, "max_num_batched_tokens": 2048, "tp": 2, "gpus": 2}
    before, after = (
        latencies(simulate(LONE, setup(**options, iteration_overhead_s=overhead_s))) for overhead_s in (0.0, 0.004)
    )
    assert after[0] - before[0] == pytest.approx(chunks * 0.004, rel=1e-9)
    assert after[1] - before[1] == pytest.approx(0.004, rel=1e-6)


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_a_pipeline_s_stages_share_it(fidelity) -> None:
    """A prompt goes through four stages in four parts: seven times a stage's quarter; a token once through all."""
    options = {"pp": 4, "gpus": 4, "fidelity": fidelity}
    before, after = (latencies(simulate(LONE, setup(**options, iteration_overhead_s=x))) for x in (0.0, 0.004))
    assert after[0] - before[0] == pytest.approx((4 + 4 - 1) * 0.001, rel=1e-9)
    assert after[1] - before[1] == pytest.approx(0.004, rel=1e-6)


@pytest.mark.parametrize("fidelity", ["step", "op"])
@pytest.mark.parametrize("gpu", [GPU, SERVED], ids=["eager", "serving"])
def test_slower_kernels_take_so_many_times_as_long(fidelity, gpu) -> None:
    """Dense attention on one GPU is kernels and nothing else."""
    options = {"gpu": gpu, "fidelity": fidelity}
    before, after = (latencies(simulate(LONE, setup(**options, kernel_slowdown=x))) for x in (1.0, 1.75))
    assert np.array(after) == pytest.approx(1.75 * np.array(before), rel=1e-9)


def test_transfers_to_the_host_are_no_kernels() -> None:
    """With all keys and values in DDR a decode step waits for PCIe, whatever the kernels take."""
    before, after = (latencies(simulate(LONE, setup("offload-all", kernel_slowdown=x))) for x in (1.0, 1.3))
    assert before[1] < after[1] < 1.3 * before[1]


@pytest.mark.parametrize("method", [{"draft": "llama-3.2-1b"}, {"draft": "medusa"}])
def test_guesses_are_kernels_too(method) -> None:
    from kvsim.scenario.scenario_file import load_scenario

    asked = {"trace": "azure-2023-code", "model": "llama-3.1-8b", "gpu": "h100-sxm", "speculate": 3, "acceptance": 0.7}
    steps_s = []
    for slowdown in (1.0, 2.0):
        (one,) = load_scenario({**asked, **method, "kernel_slowdown": slowdown}).setups()
        steps_s.append(latencies(simulate(LONE, one))[1])
    assert steps_s[1] == pytest.approx(2 * steps_s[0], rel=1e-9)


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_a_request_is_on_its_way_first(fidelity) -> None:
    """It shifts all that the scheduler sees by as much, so only what clients wait for the first token changes."""
    requests = trace([0.0, 0.01, 3.0], [9000, 4000, 500], [20, 5, 9])
    before, after = (simulate(requests, setup(fidelity=fidelity, request_overhead_s=x)).requests for x in (0.0, 0.25))
    assert np.array_equal(after["arrival_s"], requests.arrival_s)
    for name in ("admitted_s", "first_token_s", "finish_s"):
        assert after[name] - before[name] == pytest.approx(0.25, rel=1e-9)


def test_the_next_turn_is_on_its_way_after_its_think_time() -> None:
    turns = trace([0.0, 1.0, 2.0], [1000, 2000, 3000], 8, session=[0, 0, 0], think_s=[np.nan, 0.5, 0.5])
    found = simulate(turns, setup(sessions="closed", request_overhead_s=0.25)).requests
    assert found["arrival_s"][1:] == pytest.approx(found["finish_s"][:-1] + 0.5, rel=1e-12)
    alone = simulate(turns.head(1), setup(request_overhead_s=0.25)).requests
    assert found["finish_s"][0] == pytest.approx(alone["finish_s"][0])
    assert np.all(found["admitted_s"] - found["arrival_s"] >= 0.25 - 1e-12)


def test_patience_is_the_client_s() -> None:
    requests = trace([0.0, 0.0], [30_000, 30_000], 4)
    alone_s = latencies(simulate(requests.head(1), setup()))[0]
    timeout_s = 1.2 * alone_s + 0.3
    found = simulate(requests, setup(max_num_seqs=1, timeout_s=timeout_s, request_overhead_s=0.3)).requests
    assert found["status"].tolist() == ["finished", "timed_out"]
    assert found["timed_out_s"][1] == pytest.approx(timeout_s)


def test_causes_still_add_up_to_latencies() -> None:
    requests = trace(np.linspace(0, 2, 20), np.arange(20) * 700 + 300, 30)
    options = {"iteration_overhead_s": 0.003, "request_overhead_s": 0.1, "kernel_slowdown": 1.5}
    summary = summarize(simulate(requests, setup("shadowkv", gpus=2, tp=2, **options)))
    for phase, whole in (("e2e", "e2e_s"), ("ttft", "ttft_s")):
        spent_s = summary["attribution"][phase]["mean_s"]
        assert sum(spent_s.values()) == pytest.approx(summary[whole]["mean"], rel=1e-9)
        assert spent_s["queue"] >= 0.1
    plain = summarize(simulate(requests, setup("shadowkv", gpus=2, tp=2)))
    more_s = summary["attribution"]["e2e"]["mean_s"]["overhead"] - plain["attribution"]["e2e"]["mean_s"]["overhead"]
    assert more_s > 29 * 0.003  # of each of 30 tokens' iterations, and of the prompts' between them


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--iteration-overhead", "2m"], "iteration_overhead_s=120.0 must be from 0 to 60 s"),
        (["--request-overhead", "61"], "request_overhead_s=61.0 must be from 0 to 60 s"),
        (["--kernel-slowdown", "0"], "kernel_slowdown=0.0 must be from 0.01 to 100"),
        (["--kernel-slowdown", "nan"], "nan"),
        (["--request-overhead", "1s", "--timeout", "1s"], "is all of a timeout"),
    ],
)
def test_what_is_no_such_constant_is_told(flags, words, capsys) -> None:
    asked = ["simulate", "--trace", "azure-2023-code", "--limit", "5", "--model", "llama-3.1-8b", "--gpu", "h100-sxm"]
    assert main([*asked, *flags]) == 2
    assert words in capsys.readouterr().err
