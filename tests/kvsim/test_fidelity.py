"""The two fidelities against each other, and the closed forms of the step fidelity against plain summation."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import GPU, HOST, MODEL, random_trace, setup, trace

from kvsim.engine.testing import MOST_PARTS, OPEN_SPANS, PART, REPLICA, runs
from kvsim.hardware.machine import Machine
from kvsim.iteration.clock import Clock, Load
from kvsim.models import load_model
from kvsim.plans.derive import PlanTable
from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate
from policies import POLICIES, parse_policy

LATENCIES = ("first_token_s", "finish_s")


@pytest.mark.parametrize(
    "policy", [*POLICIES, "squeezed-attention:tier=ddr,levels=2", "full@heads=2+sink-window@heads=6"]
)
def test_alone_on_a_host_both_fidelities_agree(policy):
    """One replica has nobody to compete with: event by event or in closed form, times agree to 1e-6."""
    requests = random_trace(8, 6)
    step = simulate(requests, setup(policy, max_num_batched_tokens=4096))
    op = simulate(requests, setup(policy, max_num_batched_tokens=4096, fidelity="op"))
    for name in LATENCIES:
        assert step.requests[name] == pytest.approx(op.requests[name], rel=1e-6)
    assert step.traffic == op.traffic


@pytest.mark.parametrize("policy", ["offload-all", "retrieval-attention", "shadowkv", "infllm"])
def test_under_contention_the_gap_stays_bounded(policy):
    """Where GPUs compete, step divides the host by the replicas that are busy; op lets every flow compete.

    The bounds hold here by a margin: makespan within 2 %, mean time in the system within 5 %, mean TPOT within 12 %.
    """
    options = {"gpus": 4, "max_num_batched_tokens": 1 << 16}
    mixed = random_trace(9, 10, span_s=6.0)
    step, op = (simulate(mixed, setup(policy, fidelity=f, **options)) for f in ("step", "op"))
    assert step.traffic == op.traffic
    assert step.makespan_s == pytest.approx(op.makespan_s, rel=0.02)
    a, b = summarize(step), summarize(op)
    assert a["e2e_s"]["mean"] == pytest.approx(b["e2e_s"]["mean"], rel=0.05)
    assert a["tpot_s"]["mean"] == pytest.approx(b["tpot_s"]["mean"], rel=0.12)
    alike = trace([0.0] * 4, 16000, 6)
    step, op = (simulate(alike, setup(policy, fidelity=f, **options)) for f in ("step", "op"))
    assert step.makespan_s == pytest.approx(op.makespan_s, rel=0.02)


@pytest.mark.parametrize(("policy", "seed"), [("offload-all", 3), ("offload-all", 5), ("shadowkv", 6)])
def test_random_clusters_stay_within_the_stated_bounds(policy, seed):
    """Some of the worst of 42 random clusters, with 2 to 8 GPUs on a host: the bounds of docs/architecture.md.

    Step counts a neighbour as using the host for as long as it has work, so it errs on the slow side.
    """
    rng = np.random.default_rng(seed)
    n, gpus = int(rng.integers(4, 13)), int(rng.choice([2, 4, 8]))
    mixed = random_trace(100 + seed, n, span_s=float(rng.uniform(0.5, 6)), prompts=(3000, 20000), outputs=(2, 10))
    options = {"gpus": gpus, "max_num_batched_tokens": 1 << 16}
    step, op = (simulate(mixed, setup(policy, fidelity=f, **options)) for f in ("step", "op"))
    a, b = summarize(step), summarize(op)
    assert 0.99 < step.makespan_s / op.makespan_s < 1.06
    assert 0.99 < a["ttft_s"]["mean"] / b["ttft_s"]["mean"] < 1.10
    assert 0.99 < a["e2e_s"]["mean"] / b["e2e_s"]["mean"] < 1.15
    assert 0.99 < a["tpot_s"]["mean"] / b["tpot_s"]["mean"] < (1.45 if policy == "offload-all" else 1.06)


def test_where_most_time_is_decoding_the_gap_is_wider():
    """Eight layers, outputs of 150 to 200 tokens: each step fetches, and step lets every fetch meet a neighbour's."""
    model = replace(MODEL, name="eight layers", layers=MODEL.layers[:8])
    requests = random_trace(301, 40, span_s=0.3, prompts=(12_000, 16_000), outputs=(150, 200))
    step, op = (simulate(requests, setup("shadowkv", model=model, gpus=2, fidelity=f)) for f in ("step", "op"))
    a, b = summarize(step), summarize(op)
    assert step.traffic == op.traffic
    assert 1.0 < step.makespan_s / op.makespan_s < 1.10
    assert 1.0 < a["e2e_s"]["mean"] / b["e2e_s"]["mean"] < 1.18
    assert 1.0 < a["tpot_s"]["mean"] / b["tpot_s"]["mean"] < 1.20


class Run:
    """A run of the engine in which iteration i takes `seconds(i)`."""

    def __init__(self, seconds, steps):
        self.parts = np.zeros((1, MOST_PARTS + OPEN_SPANS), dtype=PART)

        def price_step(cluster, prices, number, step, busy):
            busy[:] = seconds(step)
            return seconds(step)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "_price_step", price_step)
            self._n_parts = runs.split(SimpleNamespace(parts=self.parts), None, 0, steps)

    def _replica(self):
        replica = np.zeros(1, dtype=REPLICA)[0]
        replica["n_parts"] = self._n_parts
        return replica

    @property
    def steps(self):
        return runs.charge_busy(self.parts[0], self._replica())

    @property
    def seconds(self):
        return runs.run_s(self.parts[0], self._replica())

    def busy(self):
        replica = self._replica()
        runs.charge_busy(self.parts[0], replica)
        return replica["busy_s"]

    def steps_by(self, seconds):
        return runs.steps_by(self.parts[0], self._replica(), seconds)

    def head(self, steps):
        head, replica = copy.copy(self), self._replica()
        head.parts = self.parts.copy()
        runs.shorten(head.parts[0], replica, steps)
        head._n_parts = replica["n_parts"]
        return head


@given(
    steps=st.integers(1, 400),
    lines=st.lists(st.tuples(st.floats(0.001, 1), st.floats(0, 0.01)), min_size=1, max_size=5),
    left=st.floats(0.01, 1),
)
def test_a_run_in_closed_form_is_the_sum_of_its_steps(steps, lines, left):
    """Any maximum of lines is priced exactly, and time is inverted to the step under way."""

    def seconds(i):
        return max(a + b * i for a, b in lines)

    run = Run(seconds, steps)
    each = [seconds(i) for i in range(steps)]
    assert run.steps == steps
    assert run.seconds == pytest.approx(sum(each), rel=1e-6)
    assert run.busy()[0] == pytest.approx(sum(each), rel=1e-6)
    target = left * run.seconds
    done = run.steps_by(target)
    assert run.head(done).seconds >= target * (1 - 1e-9)
    assert done == 1 or run.head(done - 1).seconds < target * (1 + 1e-9)


@pytest.mark.parametrize("policy", ["full", "shadowkv", "quest", "infllm", "sink-window"])
def test_decode_runs_equal_decode_steps(policy):
    """A request served alone, charged run by run, ends when the sum of its single steps says."""
    prompt, output = 5000, 300
    machine = Machine(gpu=GPU, host=HOST)
    table, clock = PlanTable(parse_policy(policy), MODEL, machine, {}), Clock(MODEL, machine)
    total = 0.0
    for g in range(1, output):
        segment = table.decode(prompt, g)
        total += clock.iteration([Load(segment.piece.structure, segment.start)], 1, 1)[0]
    times = simulate(trace([0.0], prompt, output), setup(policy, max_num_batched_tokens=8192)).requests
    assert times["finish_s"][0] - times["first_token_s"][0] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("model", ["gemma-3-12b", "gpt-oss-20b", "mixtral-8x7b", "deepseek-v3", "jamba-1.5-mini"])
def test_hybrid_and_expert_models_agree_too(model):
    shape = load_model(model)
    tp = 8 if model == "deepseek-v3" else 2
    gpu = replace(GPU, memory_bytes=8 * GPU.memory_bytes)
    requests = random_trace(10, 3, outputs=(2, 5))
    step, op = (
        simulate(requests, setup("full", model=shape, gpu=gpu, tp=tp, gpus=tp, fidelity=f)) for f in ("step", "op")
    )
    for name in LATENCIES:
        assert step.requests[name] == pytest.approx(op.requests[name], rel=1e-6)
