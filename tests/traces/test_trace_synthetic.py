"""The generator against analytic values: arrivals, lengths, shared prefixes, turns."""

import math

import numpy as np
import pytest

import traces
from traces import TraceError
from traces.arrivals import renewal_s, shape_for_cv
from traces.lengths import Fixed, LogNormal, Uniform
from traces.stats import info
from traces.synthetic import Tenant, synthesize


@pytest.mark.parametrize("family", ["gamma", "weibull"])
@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_renewal_arrivals_have_their_rate_and_cv(family, cv):
    shape = shape_for_cv(family, cv)
    times_s = renewal_s(np.random.default_rng(1), rate_rps=50, family=family, shape=shape, span_s=4000)
    gaps_s = np.diff(times_s)
    n = 200_000
    assert len(times_s) == pytest.approx(n, abs=4 * cv * math.sqrt(n))
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05)
    assert times_s[0] >= 0
    assert times_s[-1] < 4000


@pytest.mark.parametrize(("family", "cv"), [("gamma", 4.0), ("weibull", 4.0), ("gamma", 0.3)])
def test_short_spans_hold_rate_times_span_requests_on_average(family, cv):
    # Starting with a whole gap would give about (cv^2 - 1) / 2 requests too many (7.5 at CV 4) or too few.
    rng, shape = np.random.default_rng(2), shape_for_cv(family, cv)
    counts = [len(renewal_s(rng, rate_rps=1, family=family, shape=shape, span_s=20)) for _ in range(4000)]
    assert np.mean(counts) == pytest.approx(20, abs=4 * np.std(counts) / math.sqrt(len(counts)))


def test_weibull_shape_of_cv_one_is_the_exponential():
    assert shape_for_cv("weibull", 1.0) == pytest.approx(1.0)
    with pytest.raises(TraceError, match=r"cv=0\.001: a Weibull gap has a CV from"):
        shape_for_cv("weibull", 0.001)


def test_lognormal_has_its_median_and_p90():
    draws = LogNormal(median_tokens=1000, p90_tokens=4000).sample(np.random.default_rng(3), 200_000)
    assert np.median(draws) == pytest.approx(1000, rel=0.02)
    assert np.quantile(draws, 0.9) == pytest.approx(4000, rel=0.02)


def test_uniform_includes_both_ends():
    draws = Uniform(low_tokens=3, high_tokens=5).sample(np.random.default_rng(3), 1000)
    assert set(draws.tolist()) == {3, 4, 5}


def test_single_turns_hit_exactly_their_shared_prefix():
    # 2 full shared blocks of 16 (40 tokens), 8 full blocks a prompt (40 + 100 = 140 tokens): after the first request
    # every other one hits 2 of 8.
    tenant = Tenant(name="t", rate_rps=5, shared_prefix_tokens=40, prompt=Fixed(tokens=100), output=Fixed(tokens=9))
    trace = synthesize([tenant], n_requests=250, seed=4, block_tokens=16)
    assert info(trace)["infinite_cache_hit_ratio"] == pytest.approx(249 * 2 / (250 * 8), abs=1e-12)
    assert (trace.session == -1).all()
    assert set(trace.prompt_tokens.tolist()) == {140}


def test_every_turn_hits_all_full_blocks_of_its_history():
    tenant = Tenant(
        name="t",
        rate_rps=1,
        shared_prefix_tokens=50,
        prompt=Uniform(low_tokens=5, high_tokens=90),
        turns=4,
        think_mean_s=5,
    )
    trace = synthesize([tenant], duration_s=400, seed=5, block_tokens=16)
    history: dict[int, list[int]] = {}
    last_s, tokens = {}, {}
    for i, session in enumerate(trace.session.tolist()):
        blocks = trace.blocks(i).tolist()
        if session in history:
            assert blocks[: len(history[session])] == history[session]
            assert trace.arrival_s[i] == pytest.approx(last_s[session] + trace.think_s[i])
            assert trace.prompt_tokens[i] - tokens[session] in range(5, 91)  # history and answer, then the new text
        else:
            assert math.isnan(trace.think_s[i])
            assert trace.prompt_tokens[i] in range(55, 141)
        assert len(blocks) == trace.prompt_tokens[i] // 16
        assert blocks[:3] == [0, 1, 2]  # the tenant's three full blocks of 50 shared tokens
        history[session], last_s[session] = blocks, trace.arrival_s[i]
        tokens[session] = trace.prompt_tokens[i] + trace.output_tokens[i]
    own = [set(blocks[3:]) for blocks in history.values()]
    assert sum(map(len, own)) == len(set().union(*own))  # sessions share nothing else


def test_mean_turns_and_request_rate():
    tenant = Tenant(name="t", rate_rps=20, turns=3, think_mean_s=1)
    trace = synthesize([tenant], duration_s=5000, seed=6)
    sessions = len(np.unique(trace.session))
    assert len(trace) / sessions == pytest.approx(3, rel=0.02)
    assert len(trace) == pytest.approx(100_000, rel=0.02)


def test_tenants_keep_their_own_rates_and_blocks():
    pair = [
        Tenant(name="a", rate_rps=30, shared_prefix_tokens=1024),
        Tenant(name="b", rate_rps=10, shared_prefix_tokens=1024, arrivals="weibull", cv=2),
    ]
    trace = synthesize(pair, duration_s=1000, seed=7)
    found = info(trace)["tenants"]
    assert found["a"]["requests"] == pytest.approx(30_000, abs=4 * math.sqrt(30_000))
    assert found["b"]["requests"] == pytest.approx(10_000, abs=4 * 2 * math.sqrt(10_000))
    per_request = np.repeat(trace.tenant, np.diff(trace.block_offsets))
    assert not set(trace.block_ids[per_request == 0].tolist()) & set(trace.block_ids[per_request == 1].tolist())


def test_same_seed_same_trace_and_other_seed_another():
    tenants = [Tenant(name="t", rate_rps=2, cv=2, turns=2)]
    one, again, other = (synthesize(tenants, n_requests=500, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.arrival_s, again.arrival_s)
    np.testing.assert_array_equal(one.block_ids, again.block_ids)
    assert not np.array_equal(one.arrival_s, other.arrival_s)
    assert len(one) == 500


def test_tenant_text():
    text = "name=chat,rate=2,cv=1.5,prompt=lognormal:1000:4000,output=fixed:200,prefix=1024,turns=3,think=30"
    assert Tenant.parse(text) == Tenant(
        name="chat",
        rate_rps=2.0,
        cv=1.5,
        prompt=LogNormal(median_tokens=1000, p90_tokens=4000),
        output=Fixed(tokens=200),
        shared_prefix_tokens=1024,
        turns=3.0,
        think_mean_s=30.0,
    )


def test_empirical_lengths_come_from_the_named_trace():
    tenant = Tenant.parse("name=t,rate=5,prompt=empirical:azure-2023-code,output=empirical:azure-2023-conv")
    trace = synthesize([tenant], n_requests=2000, seed=8)
    assert set(trace.prompt_tokens.tolist()) <= set(traces.load("azure-2023-code").prompt_tokens.tolist())
    assert set(trace.output_tokens.tolist()) <= set(traces.load("azure-2023-conv").output_tokens.tolist())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate=2", r"tenant 'rate=2': name missing"),
        ("name=a", r"rate missing"),
        ("name=,rate=1", r"tenant name='': must not be empty"),
        ("name=a,rate=0", r"tenant a: rate_rps=0\.0: must be finite and above 0"),
        ("name=a,rate=nan", r"rate_rps=nan: must be finite"),
        ("name=a,rate=x", r"tenant rate=x: not a valid float"),
        ("name=a,rate=1,cv=0", r"cv=0\.0: must be finite and above 0"),
        ("name=a,rate=1,arrivals=poisson,cv=2", r"cv=2\.0: Poisson gaps have CV 1; use gamma or weibull"),
        ("name=a,rate=1,arrivals=pareto", r"arrivals=pareto: must be one of poisson, gamma, weibull"),
        ("name=a,rate=1,turns=0.5", r"turns=0\.5: must be a finite mean of at least 1"),
        ("name=a,rate=1,prefix=-1", r"shared_prefix_tokens=-1: must not be negative"),
        ("name=a,rate=1,prefix=1.5", r"tenant prefix=1\.5: not a valid int"),
        ("name=a,rate=1,think=-1", r"think_mean_s=-1\.0: must be finite and not negative"),
        ("name=a,rate=1,promt=fixed:1", r"unknown tenant key 'promt'; known, nearest first: prompt"),
        ("name=a,rate=1,prompt=fixt:1", r"unknown length distribution 'fixt'; known, nearest first: fixed"),
        ("name=a,rate=1,prompt=fixed:0", r"tokens=0: must be at least 1 token"),
        ("name=a,rate=1,prompt=fixed:1:2", r"must be fixed:TOKENS in whole tokens"),
        ("name=a,rate=1,prompt=uniform:9:3", r"high_tokens=3 is below low_tokens=9"),
        ("name=a,rate=1,prompt=lognormal:9:3", r"p90_tokens=3 is below median_tokens=9"),
    ],
)
def test_bad_tenant_texts_are_named(text, message):
    with pytest.raises(TraceError, match=message):
        Tenant.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of the two"),
        ({"duration_s": 1, "n_requests": 1}, "give exactly one of the two"),
        ({"duration_s": math.inf}, "duration_s=inf: must be finite and above 0"),
        ({"n_requests": 0}, "n_requests=0: must be at least 1"),
        ({"n_requests": 5, "block_tokens": 0}, "block_tokens=0: must be at least 1"),
        ({"duration_s": 1e-9}, "empty trace"),
    ],
)
def test_bad_generator_arguments_are_named(arguments, message):
    with pytest.raises(TraceError, match=message):
        synthesize([Tenant(name="a", rate_rps=1)], **arguments)
    with pytest.raises(TraceError, match="needs at least one tenant"):
        synthesize([], duration_s=1)
