"""Traces of several tenants that the tests of schedulers replay, and what they look at."""

from collections.abc import Iterator

import numpy as np
from simulated import setup, trace

from kvsim.engine.testing import Engine
from kvsim.run.simulate import _Cluster
from traces import Trace

TIMES = ("admitted_s", "first_token_s", "finish_s")


def mixed(seed: int, n: int, tenants: int, *, span_s: float = 0.0, prompts=(50, 500), outputs=(1, 60)) -> Trace:
    """Requests of several tenants, random in everything; all of them at once when the span is 0."""
    rng = np.random.default_rng(seed)
    return trace(
        np.sort(rng.uniform(0, span_s, n)),
        rng.integers(*prompts, n),
        rng.integers(*outputs, n),
        tenant=rng.integers(0, tenants, n),
        tenants=tuple("abcdef"[:tenants]),
    )


def alone(requests: Trace, code: int) -> Trace:
    """The requests of one tenant."""
    rows = requests.tenant == code
    return trace(requests.arrival_s[rows], requests.prompt_tokens[rows], requests.output_tokens[rows])


def turns(requests: Trace, options: dict) -> Iterator[Engine]:
    """The engine after each turn of its replicas."""
    cluster = _Cluster(requests, setup("full", **options))
    while cluster.engine.play(1):
        yield cluster.engine


def same(one: dict, two: dict, names=TIMES) -> bool:
    """Whether columns are equal bit for bit."""
    return all(np.array_equal(one[name], two[name], equal_nan=True) for name in names)
