"""Queueing theory: one server of constant service time, and Little's law."""

import numpy as np
import pytest
from simulated import MODEL, random_trace, setup, trace

from kvsim.run.simulate import simulate


def one_by_one(n, load, seed):
    """Poisson arrivals of equal requests at an engine that serves one at a time; `load` of its capacity."""
    s = setup("full", max_num_seqs=1)
    service_s = float(simulate(trace([0.0], 2000, 20), s).requests["finish_s"][0])
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(service_s / load, n))
    return simulate(trace(arrivals, 2000, 20), s), arrivals, service_s


def test_waits_follow_lindleys_recursion():
    """In a single queue each wait is what is left of the one before, plus its service, minus the gap."""
    result, arrivals, service_s = one_by_one(300, 0.9, 1)
    expected = [0.0]
    for gap in np.diff(arrivals):
        expected.append(max(0.0, expected[-1] + service_s - gap))
    waits = result.requests["admitted_s"] - result.requests["arrival_s"]
    assert waits == pytest.approx(expected, abs=1e-6)


def test_mean_wait_of_an_md1_queue():
    """Pollaczek-Khinchine with constant service: rho / (2 (1 - rho)) services; 4,000 arrivals estimate it to 10 %."""
    rho = 0.5
    result, _, service_s = one_by_one(4000, rho, 2)
    waits = result.requests["admitted_s"] - result.requests["arrival_s"]
    assert waits.mean() == pytest.approx(rho / (2 * (1 - rho)) * service_s, rel=0.1)


def test_littles_law():
    """Mean number in the system = arrival rate x mean time in it, with the number taken from the time series."""
    requests = random_trace(7, 200, span_s=60.0, prompts=(500, 6000), outputs=(20, 200))
    result = simulate(requests, setup("full", max_num_batched_tokens=2048))
    series, end_s = result.series, result.makespan_s
    number = series["running"] + series["waiting"]
    area = float(np.dot(number[:-1], np.diff(series["time_s"])))
    sojourn_s = (result.requests["finish_s"] - result.requests["arrival_s"]).sum()
    # The series is noted at iteration boundaries: an arrival is seen late by less than one iteration.
    assert area / end_s == pytest.approx(sojourn_s / end_s, rel=0.02)


def test_a_lone_request_takes_its_prefill_and_its_decode_steps():
    """Batch 1, dense: decode steps read the weights and a growing cache; their sum is an arithmetic series."""
    s = setup("full")
    n, output = 4000, 50
    times = simulate(trace([0.0], n, output), s).requests
    rates = s.gpu.rates
    decode_s = float(times["finish_s"][0] - times["first_token_s"][0])
    first, last = (n + 1) * 131072, (n + output - 1) * 131072
    reading_s = (output - 1) * (s.rank.weight_bytes - 2 * MODEL.embedding_params) / rates.hbm_Bps
    reading_s += (output - 1) * (first + last) / 2 / rates.hbm_Bps
    overhead_s = (output - 1) * ((3 + 1 + 4 + 2) * MODEL.n_layers + 2) * rates.launch_s
    multiply_s = (output - 1) * 2 * MODEL.active_params / rates.flops("bf16")
    # What the closed form leaves out: the append kernel's own traffic and the query and output rows, below 1 %.
    assert decode_s == pytest.approx(reading_s + overhead_s + multiply_s, rel=0.01)
