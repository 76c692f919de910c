"""Small clusters and traces that several test files simulate."""

import numpy as np

from kvsim.hardware.catalogue import load_gpu, load_host
from kvsim.models import load_model
from kvsim.run.simulate import Setup
from policies import parse_policy
from traces import Trace

MODEL = load_model("llama-3.1-8b")
GPU = load_gpu("h100-sxm@eager")
HOST = load_host("ddr5-dual-xeon")


def setup(policy: str = "full", **options) -> Setup:
    """Llama-3.1-8B on H100s unless `options` say otherwise."""
    given = {"model": MODEL, "gpu": GPU, "host": HOST, **options}
    return Setup(policy=parse_policy(policy), **given)


def trace(arrival_s, prompt_tokens, output_tokens, **columns) -> Trace:
    """A trace from columns; single numbers stand for a constant column."""
    n = len(arrival_s)
    prompts, outputs = (np.broadcast_to(np.asarray(x), n) for x in (prompt_tokens, output_tokens))
    return Trace.from_columns(name="test", arrival_s=arrival_s, prompt_tokens=prompts, output_tokens=outputs, **columns)


def random_trace(seed: int, n: int = 12, *, span_s: float = 20.0, prompts=(3000, 30000), outputs=(1, 12)) -> Trace:
    """Requests of uniformly random arrival and length."""
    rng = np.random.default_rng(seed)
    return trace(np.sort(rng.uniform(0, span_s, n)), rng.integers(*prompts, n), rng.integers(*outputs, n))
