"""Inter-token latencies of each of several tenants that share batches."""

import numpy as np
import pytest
from simulated import setup, trace
from tenants import mixed

from kvsim.results.summary import finished, summarize
from kvsim.run.simulate import simulate
from kvsim.scenario.tenants import Tenant

TIGHT = {"kv_cache_tokens": 8500}


@pytest.mark.parametrize(
    ("options", "preempted"),
    [
        ({}, False),
        ({"fidelity": "op"}, False),
        ({"scheduler": "fair", "max_num_seqs": 5}, False),
        ({"scheduler": "priority", "tenants": {"b": Tenant(priority=1)}, **TIGHT}, True),
        ({"preemption": "recompute", **TIGHT}, True),
        ({"tenants": {"a": Tenant(quota=0.9)}, **TIGHT}, True),
        ({"gpus": 4, "prefill_gpus": 2}, False),
        ({"gpus": 3, "router": "least-loaded"}, False),
    ],
)
def test_each_tenants_gaps_fill_the_time_from_first_to_last_token(options: dict, preempted: bool) -> None:
    """A request's gaps follow each other, one for each token after the first, whatever batches it was in."""
    requests = mixed(1, 40, 3, span_s=3.0, prompts=(200, 3000), outputs=(1, 400))
    result = simulate(requests, setup("full", max_num_batched_tokens=1024, **options))
    columns = result.requests
    assert bool(columns["preemptions"].any()) is preempted
    assert finished(result).all()
    assert result.tenant_gaps is not None
    for number, name in enumerate(requests.tenants):
        own = requests.tenant == number
        seconds, tokens = result.tenant_gaps.of(name)
        assert tokens.sum() == (requests.output_tokens[own] - 1).sum()
        decoding_s = (columns["finish_s"] - columns["first_token_s"])[own].sum()
        assert (seconds * tokens).sum() == pytest.approx(decoding_s, rel=1e-12)
    # All together they are the gaps of everybody, one by one.
    seconds, tokens = (np.concatenate(part) for part in zip(*map(result.tenant_gaps.of, requests.tenants), strict=True))
    everybody_s = np.sort(np.repeat(*result.token_gaps))
    assert np.array_equal(np.sort(np.repeat(seconds, tokens)), everybody_s)


def test_a_tenant_that_comes_later_has_other_gaps_in_the_same_batch() -> None:
    """`b` decodes only beside `a`, whose own steps alone are faster; each of its steps is one of `a`'s, too."""
    requests = trace([0.0, 0.05], 20_000, [400, 20], tenant=[0, 1], tenants=("a", "b"))
    result = simulate(requests, setup("full"))
    assert result.tenant_gaps is not None
    (a_s, a_tokens), (b_s, b_tokens) = map(result.tenant_gaps.of, "ab")
    assert (a_tokens.tolist(), b_tokens.tolist()) == ([1] * 399, [1] * 19)
    shared = np.isin(a_s, b_s)
    assert np.array_equal(a_s[shared], b_s)  # in the same steps
    assert a_s[~shared].min() < b_s.min()
    summary = summarize(result)
    assert summary["tenants"]["b"]["itl_s"]["mean"] == pytest.approx(b_s.mean())
    assert summary["tenants"]["b"]["itl_s"]["p50"] > summary["tenants"]["a"]["itl_s"]["p50"]
