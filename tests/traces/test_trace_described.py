"""A workload in words is what the generator makes of the same tenants, drawn by the seed."""

import numpy as np
import pytest

import traces
from traces import TraceError
from traces.synthetic import Tenant, synthesize


def test_it_is_the_generator_s_trace() -> None:
    words = "rate=2,prompt=fixed:1000,output=lognormal:100:300,prefix=512,turns=2"
    found = traces.load(f"synthetic:{words},span_s=120,block_tokens=64", seed=3)
    made = synthesize([Tenant.parse(f"name=default,{words}")], duration_s=120, seed=3, block_tokens=64)
    assert found.same_requests(made)
    assert found.tenants == ("default",)
    assert not found.same_requests(traces.load(f"synthetic:{words},span_s=120,block_tokens=64", seed=4))


def test_tenants_are_joined() -> None:
    found = traces.load("synthetic:name=chat,rate=2,span_s=200+name=code,rate=1,prompt=fixed:3000")
    assert found.tenants == ("chat", "code")
    assert set(found.prompt_tokens[found.tenant == 1]) == {3000}
    assert np.isclose((found.tenant == 0).sum() / 200, 2, rtol=0.3)


def test_a_limit_keeps_the_first() -> None:
    assert len(traces.load("synthetic:rate=5", limit=7)) == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("synthetic", "rate missing"),
        ("synthetic:rate=0", "above 0"),
        ("synthetic:rate=1,promt=fixed:3", "prompt"),
        ("synthetic:rate=1+rate=2", "name missing"),
        ("synthetic:rate=1,span_s=2,span_s=3", "twice"),
        ("synthetic:rate=1,span_s=x", "not a valid float"),
    ],
)
def test_what_is_wrong_is_said(text: str, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        traces.load(text)


def test_options_of_files_are_refused() -> None:
    with pytest.raises(TraceError, match="nothing is read from a file"):
        traces.load("synthetic:rate=1", skip_bad_rows=True)
