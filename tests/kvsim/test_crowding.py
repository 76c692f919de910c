"""More sequences than a link can serve: said where fewer give nearly as much, and what it promises is kept."""

import re

import numpy as np
from simulated import setup, trace

from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate

CROWDED = trace([0.0] * 16, 20_000, 600)


def told(policy: str, **options: object) -> dict:
    return summarize(simulate(CROWDED, setup(policy, **options)))


def test_the_number_that_is_named_gives_what_it_promises() -> None:
    """All caches over PCIe at every step: sixteen sequences share what a few would have."""
    many = told("offload-all")
    (text,) = many["warnings"]
    found = re.match(
        r"more sequences than copies over PCIe can serve: decoding waits for that in (\S+)% of its time, and a replica "
        r"decodes (\S+) sequences at a time in the mean, which add latency and hardly any tokens; --max-num-seqs (\d+) "
        r"would give at least (\d+)% of the tokens/s, a token in at most (\d+)% of the time$",
        text,
    )
    assert found is not None, text
    _, sequences, fewer, tokens, time = map(float, found.groups())
    assert 14 < sequences <= 16
    assert fewer <= sequences / 2
    few = told("offload-all", max_num_seqs=int(fewer))
    assert few["output_tokens_per_s"] >= tokens / 100 * many["output_tokens_per_s"]
    assert few["tpot_s"]["mean"] <= (time + 1) / 100 * many["tpot_s"]["mean"]


def test_batches_that_gain_from_their_size_raise_no_alarm() -> None:
    assert told("full")["warnings"] == []
    assert told("offload-all", max_num_seqs=2)["warnings"] == []  # half of which would give much less
    assert told("offload-all", max_num_seqs=1)["warnings"] == []


def test_requests_that_never_decode_raise_none() -> None:
    rejected = simulate(trace([0.0], 1000, 5), setup("offload-all", kv_cache_tokens=10))
    assert summarize(rejected)["warnings"] == []
    one = simulate(trace([0.0] * 4, 1000, 1), setup("offload-all"))
    assert np.all(one.requests["status"] == "finished")
    assert summarize(one)["warnings"] == []
