"""Requests that leave because their first token has not come in time."""

import numpy as np
import pytest
from simulated import setup, trace
from tenants import TIMES, mixed, same

from kvsim.results.summary import summarize
from kvsim.run.simulate import _Cluster, simulate
from kvsim.scenario.tenants import Tenant
from traces import Trace


def queue_of_one(arrival_s: np.ndarray, service_s: float, timeout_s: float) -> list[float | None]:
    """When each of a lone server's requests ends, None for those that leave: an iteration once begun is not stopped."""
    ends: list[float | None] = []
    free_s = 0.0
    for at_s in arrival_s.tolist():
        begin_s = max(free_s, at_s)
        if begin_s > at_s + timeout_s:
            ends.append(None)
            continue
        free_s = begin_s + service_s
        ends.append(free_s if free_s <= at_s + timeout_s else None)
    return ends


@pytest.mark.parametrize("fidelity", ["step", "op"])
@pytest.mark.parametrize("patience", [1.5, 4.0])
def test_one_server_and_impatient_clients(patience: float, fidelity: str) -> None:
    """One prompt at a time, of one chunk and one token: a queue that a few lines replay."""
    alone = simulate(trace([0.0], 4000, 1), setup("full", fidelity=fidelity))
    service_s = float(alone.requests["finish_s"][0])
    arrival_s = np.cumsum(np.random.default_rng(5).exponential(0.8 * service_s, 80))
    options = {"max_num_seqs": 1, "timeout_s": patience * service_s, "fidelity": fidelity}
    result = simulate(trace(arrival_s, 4000, 1), setup("full", **options))
    expected = queue_of_one(arrival_s, service_s, patience * service_s)
    finished = [end_s is not None for end_s in expected]
    assert 10 < sum(finished) < 70
    assert (result.requests["status"] == "finished").tolist() == finished
    ends_s = [end_s for end_s in expected if end_s is not None]
    assert result.requests["finish_s"][finished] == pytest.approx(ends_s, rel=1e-9)
    gone_s = result.requests["timed_out_s"]
    assert np.array_equal(np.isnan(gone_s), finished)
    assert gone_s[~np.array(finished)] == pytest.approx((arrival_s + patience * service_s)[~np.array(finished)])
    summary = summarize(result)
    assert summary["requests"] == {
        "submitted": 80,
        "finished": sum(finished),
        "rejected": 0,
        "timed_out": 80 - sum(finished),
    }
    assert summary["slo_attainment"] == sum(finished) / 80


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_work_for_nobody_counts_as_work(fidelity: str) -> None:
    """A prompt that nobody waits for any more keeps the replica as busy, and as long, as one that is waited for."""
    waited = simulate(trace([0.0], 4000, 1), setup("full", fidelity=fidelity))
    left = simulate(trace([0.0], 4000, 1), setup("full", fidelity=fidelity, timeout_s=waited.makespan_s / 2))
    assert left.requests["status"].tolist() == ["timed_out"]
    assert left.makespan_s == waited.makespan_s == waited.requests["finish_s"][0]
    assert left.busy == waited.busy
    assert left.memory == waited.memory


CASES = (
    {},
    {"scheduler": "fair", "max_num_seqs": 4},
    {"scheduler": "priority", "tenants": {"a": Tenant(priority=1)}, "kv_cache_tokens": 8500},
    {"preemption": "recompute", "kv_cache_tokens": 8500},
    {"tenants": {"b": Tenant(quota=0.02), "c": Tenant(quota=0.001)}},
    {"gpus": 4, "prefill_gpus": 2},
    {"gpus": 3, "router": "least-loaded"},
)


@pytest.mark.parametrize("options", CASES)
def test_whoever_is_offered_ends_in_one_way_and_leaves_nothing(options: dict) -> None:
    """Offered = finished + rejected + timed out, alike in both fidelities, and all memory is free again."""
    requests = mixed(11, 30, 3, span_s=2.0, prompts=(500, 9000), outputs=(1, 60))
    ended = []
    for fidelity in ("step", "op"):
        s = setup("full", timeout_s=0.3, max_num_batched_tokens=1024, fidelity=fidelity, **options)
        cluster = _Cluster(requests, s)
        cluster.play(None)
        state = cluster.engine.cluster
        for name in ("held_bytes", "stored_bytes", "growth_bytes", "outstanding_tokens", "expected", "length"):
            assert not state.replicas[name].any(), name
        for name in ("held_bytes", "stored_bytes", "decoding", "length"):
            assert not state.tenants[name].any(), name
        assert cluster.engine.left == len(requests)
        columns = cluster.outcome().result(wall_s=0, cpu_s=0, setup_cpu_s=0).requests
        ended.append(columns["status"])
        ttft_s = columns["first_token_s"] - columns["arrival_s"]
        assert (ttft_s[columns["status"] == "finished"] <= 0.3).all()
        assert np.isnan(ttft_s[columns["status"] == "timed_out"]).all()
    assert set(np.unique(ended[0])) >= {"finished", "timed_out"}
    assert set(np.unique(ended[0])) <= {"finished", "rejected", "timed_out"}
    assert (ended[0] == ended[1]).all()


CACHES = (
    {"prefix_cache_eviction": "lfu", "prefix_cache_hbm_bytes": 2 << 30},
    {"prefix_cache_eviction": "scheduler-aware"},
    {"prefix_cache_prefetch": True, "prefix_cache_nvme_bytes": 4 << 30, "prefix_cache_write": "back"},
    {"gpus": 2, "router": "kv-aware", "prefix_cache_remote_bytes": 4 << 30},
)


@pytest.mark.parametrize("options", CACHES)
def test_who_was_admitted_has_asked_the_caches_and_nothing_is_kept_for_who_has_left(options: dict) -> None:
    """Every admitted prompt asks the first tier for all its blocks, whether or not its client stays until the end."""
    rng, n, blocks, documents = np.random.default_rng(5), 40 * options.get("gpus", 1), 8, 6
    ids = (100 * rng.integers(documents, size=n)[:, None] + np.arange(blocks)).ravel()
    requests = trace(
        np.sort(rng.uniform(0, 2, n)), 512 * blocks, 8, block_tokens=512, block_ids=ids, block_counts=[blocks] * n
    )
    s = setup("full", timeout_s=0.3, max_num_batched_tokens=512, prefix_cache_ddr_bytes=1 << 30, **options)
    cluster = _Cluster(requests, s)
    cluster.play(None)
    result = cluster.outcome().result(wall_s=0, cpu_s=0, setup_cpu_s=0)
    admitted = ~np.isnan(result.requests["admitted_s"])
    assert (admitted & (result.requests["status"] == "timed_out")).any()
    assert not admitted.all()
    asked = max(
        tier["lookup_blocks"] for tier in result.cache.values()
    )  # the first tier; the rest are asked for misses
    assert asked == blocks * admitted.sum()
    prefixes = cluster.engine.cluster.prefixes
    assert not prefixes.tiers["taken_bytes"].any()
    assert not prefixes.chains["is_ahead"].any()


def test_memory_of_a_prompt_that_is_given_up_goes_to_who_waits_for_it() -> None:
    """In chunks of 256 tokens the first prompt takes longer than its client waits, and there is no room beside it."""
    requests = trace([0.0, 0.01], [60_000, 50_000], 1, tenant=[0, 1], tenants=("a", "b"))
    s = setup("full", tenants={"a": Tenant(timeout_s=0.5)}, max_num_batched_tokens=256, kv_cache_tokens=70_000)
    result = simulate(requests, s)
    assert result.requests["status"].tolist() == ["timed_out", "finished"]
    iteration_s = 0.02  # each takes less
    assert 0.5 < result.requests["admitted_s"][1] < 0.5 + iteration_s
    assert result.series["hbm_bytes"].max() - s.rank.weight_bytes == 60_000 * 131072


def test_a_tenant_may_wait_longer_and_a_timeout_that_is_never_reached_changes_nothing() -> None:
    requests = mixed(3, 60, 2, span_s=2.0, prompts=(500, 9000), outputs=(1, 60))
    base = simulate(requests, setup("full"))
    longest_s = np.max(base.requests["first_token_s"] - base.requests["arrival_s"])
    never = simulate(requests, setup("full", timeout_s=float(longest_s) * 2))
    assert same(base.requests, never.requests, names=TIMES)
    assert base.traffic == never.traffic
    patient = simulate(requests, setup("full", timeout_s=0.1, tenants={"a": Tenant(timeout_s=float(longest_s))}))
    lost = patient.requests["status"] == "timed_out"
    assert lost.any()
    assert set(patient.requests["tenant"][lost]) == {"b"}


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_in_closed_loop_a_session_goes_on_from_when_its_request_left(fidelity: str) -> None:
    """It thinks for 3 s after the timeout, as it would have after the answer."""
    requests = Trace.from_columns(
        name="session",
        arrival_s=[0.0, 100.0],
        prompt_tokens=[100_000, 100],
        output_tokens=[10, 10],
        session=[0, 0],
        think_s=[np.nan, 3.0],
    )
    result = simulate(requests, setup("full", sessions="closed", timeout_s=0.5, fidelity=fidelity))
    assert result.requests["status"].tolist() == ["timed_out", "finished"]
    assert result.requests["arrival_s"][1] == pytest.approx(3.5, rel=1e-12)
    # The iteration with the prompt's chunk is not stopped, so 3.5 s finds an idle replica again.
    assert result.requests["admitted_s"][1] == result.requests["arrival_s"][1]
