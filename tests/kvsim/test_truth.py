"""Warnings of what cannot be so: each fires on a contradiction counted by hand, and on no run that is sound."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from page_reader import Document
from simulated import random_trace, setup, trace

from kvsim.__main__ import main
from kvsim.hardware.catalogue import load_gpu
from kvsim.models import load_model
from kvsim.report.report import report_html
from kvsim.results.summary import Result, summarize
from kvsim.results.truth import Limits, limits_of, warnings_of
from kvsim.run.simulate import simulate

LESS = "less is served than offered: "


def result_of(
    admitted_per_s: float, *, arrivals_per_s: float = 2.0, count: int = 401, **changes: Any
) -> dict[str, Any]:
    """Evenly spaced arrivals, of which so many a second are admitted, in order; all leave after another second."""
    arrival_s = np.arange(count) / arrivals_per_s
    admitted_s = np.maximum(arrival_s, np.arange(count) / admitted_per_s)
    given = {
        "inputs": {"sessions": "open"},
        "requests": {
            "request": np.arange(count),
            "arrival_s": arrival_s,
            "admitted_s": admitted_s,
            "first_token_s": admitted_s + 0.5,
            "prompt_tokens": np.full(count, 1000),
            "cached_tokens": np.zeros(count, int),
            "status": np.full(count, "finished"),
        },
        "gaps": (np.array([0.01]), np.array([5])),
        "links": {"hbm->sm": {"bytes": 1000.0, "busy_s": 1.0, "utilization": 0.5}},
        "busy": {"compute": 0.5, "hbm": 0.3, "pcie_up": 0.1},
        "makespan_s": float(admitted_s[-1]) + 1.0,
        "limits": None,
    }
    return given | changes


def test_a_growing_queue_beside_idle_resources_is_said() -> None:
    # 2/s for 200 s, 1/s admitted: requests wait from 0.5 s to 400 s, and compute and HBM fill 0.8 of the whole 401 s.
    (text,) = warnings_of(**result_of(1.0))
    assert text.startswith(LESS + "2 requests/s arrive in the later half of the trace and 1 are admitted")
    assert "busy for 90% of the time in which requests wait (the most, compute and hbm together: 80." in text


@pytest.mark.parametrize(
    "sound",
    [
        result_of(2.0),
        result_of(1.95),  # within 5 %
        result_of(1.0, count=30),  # 15 in half of the trace say little
        result_of(1.0, busy={"compute": 0.6, "hbm": 0.3}),  # kernels that stream and then multiply fill the GPU
        result_of(1.0, busy={"compute": 0.1, "cpu": 0.91}),
        result_of(1.0, inputs={"sessions": "closed"}),  # which offer what is served
        result_of(1.0, arrivals_per_s=1e6),  # all at once, and none later
    ],
    ids=["served", "nearly", "few", "busy GPU", "busy CPU", "closed", "at once"],
)
def test_a_sound_run_has_no_warning(sound: Mapping[str, Any]) -> None:
    if sound["requests"]["arrival_s"][-1] < 1:
        sound["requests"]["arrival_s"][:] = 0.0
    assert warnings_of(**sound) == []


def test_resources_that_were_busy_while_requests_waited_raise_no_alarm_by_idling_afterwards() -> None:
    # A last request that decodes alone for as long again halves every share of the makespan.
    found = result_of(1.0, busy={"compute": 0.3, "hbm": 0.2}, makespan_s=800.0)
    assert warnings_of(**found) == []  # half of 800 s may have been all of the 399.5 s with a queue


def test_requests_that_leave_unserved_are_offered_and_rejected_ones_are_not() -> None:
    served = np.arange(401) % 2 == 0
    found = result_of(2.0, busy={"compute": 0.2})
    for name in ("admitted_s", "first_token_s"):
        found["requests"][name][~served] = np.nan
    found["requests"]["timed_out_s"] = np.where(served, np.nan, found["requests"]["arrival_s"] + 30)
    found["requests"]["status"] = np.where(served, "finished", "timed_out")
    (text,) = warnings_of(**found)
    assert text.startswith(LESS + "2 requests/s arrive in the later half of the trace and 1 are admitted")
    found["requests"]["status"] = np.where(served, "finished", "rejected")
    assert warnings_of(**found) == []


def test_links_above_their_bandwidth_are_said() -> None:
    limits = Limits(prompt_token_s=0.0, decode_step_s=0.0, link_Bps={"hbm->sm": 10.0})
    busy = {"hbm->sm": {"bytes": 5.0, "busy_s": 9.0, "utilization": 1.25}}
    assert warnings_of(**result_of(2.0, links=busy)) == [
        "a link above its bandwidth: hbm->sm is busy for 125.0% of the time"
    ]
    full = {"hbm->sm": {"bytes": 10 * 200.5, "busy_s": 9.0, "utilization": 1.0}}
    assert warnings_of(**result_of(2.0, links=full, makespan_s=200.5, limits=limits)) == []
    full["hbm->sm"]["bytes"] += 3
    (text,) = warnings_of(**result_of(2.0, links=full, makespan_s=200.5, limits=limits))
    assert text.startswith("a link above its bandwidth: 1.961 KiB crossed hbm->sm in 3.342 min, and the datasheet lets")


def test_times_below_the_floor_are_said() -> None:
    limits = Limits(prompt_token_s=0.0005, decode_step_s=0.01, link_Bps={})
    assert warnings_of(**result_of(2.0, limits=limits)) == []  # 0.5 s for 1,000 tokens, and 10 ms a token: both floors
    (text,) = warnings_of(**result_of(2.0, limits=limits._replace(decode_step_s=0.0125)))
    assert text == (
        "a time below the datasheet's floor: a token came 10 ms after the one before, and reading the weights that it "
        "multiplies takes 12.5 ms"
    )
    (text,) = warnings_of(**result_of(2.0, limits=limits._replace(prompt_token_s=0.0006)))
    assert text == (
        "a time below the datasheet's floor: 401 prompts took less than their products with the weights, request 0 "
        "with 500 ms in place of at least 600 ms"
    )
    cached = result_of(2.0, limits=limits._replace(prompt_token_s=0.0006))
    cached["requests"]["cached_tokens"] += 200
    assert warnings_of(**cached) == []  # 800 of them were computed


def test_limits_are_those_of_the_datasheet() -> None:
    found = limits_of(setup(gpus=8, tp=2))
    assert found is not None
    # Layers of Llama-3.1-8B: 32 x (2 x 4096 x 4096 + 2 x 4096 x 1024 + 3 x 4096 x 14336) weights in 2 B, halved by tp.
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert found.decode_step_s == pytest.approx(weights * 2 / 2 / 3.35e12, rel=2e-3)  # norms are besides
    assert found.prompt_token_s == pytest.approx(2 * weights / 2 / 989.4e12, rel=2e-3)
    assert found.link_Bps["hbm->sm"] == pytest.approx(8 * 3.35e12)
    assert limits_of(setup(gpus=8, tp=2, gpu=load_gpu("h100-sxm@datasheet"))) == found
    own = load_gpu("h100-sxm")
    assert limits_of(setup(gpu=replace(own, sms=own.sms + 1))) is None  # another chip of that name
    assert limits_of(setup(gpu=replace(own, name="mine"))) is None


@pytest.mark.parametrize("fidelity", ["step", "op"])
@pytest.mark.parametrize("policy", ["full", "shadowkv", "offload-all", "quest"])
def test_simulations_stay_within_the_datasheet(policy: str, fidelity: str) -> None:
    """Also where the datasheet's own rates price them."""
    model = replace(load_model("llama-3.1-8b"), layers=load_model("llama-3.1-8b").layers[:4])
    options = {"model": model, "fidelity": fidelity, "gpu": load_gpu("h100-sxm@datasheet")}
    result = simulate(random_trace(3, 8, span_s=1.0, prompts=(500, 9000)), setup(policy, **options))
    assert result.limits is not None
    assert summarize(result)["warnings"] == []


def test_a_limit_of_one_sequence_is_seen_in_the_summary_the_printout_and_the_page(
    capsys: pytest.CaptureFixture[str], make_result: Callable[..., Result]
) -> None:
    arrivals = np.arange(61) / 50
    crowd = simulate(trace(arrivals, 300, 12), setup(max_num_seqs=1))
    (text,) = summarize(crowd)["warnings"]
    assert text.startswith(LESS + "50 requests/s arrive")
    assert f"Warning: {text}." in Document(report_html([crowd])).text
    assert f"Warning: full: {text}." in Document(report_html([crowd, make_result(policy="other")])).text
    assert "Warning" not in Document(report_html([make_result()])).text
    flags = ["--trace", "azure-2023-code", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--limit", "60"]
    assert main(["simulate", *flags, "--rate-scale", "30", "--max-num-seqs", "1"]) == 0
    assert f"\nwarning: {LESS}" in capsys.readouterr().out
    both = ["--policy", "full", "--policy", "quest"]
    assert main(["compare", *flags, *both, "--rate-scale", "30", "--max-num-seqs", "1"]) == 0
    out = capsys.readouterr().out
    assert f"\nwarning: full: {LESS}" in out
    assert f"\nwarning: quest: {LESS}" in out
    assert main(["simulate", *flags]) == 0
    assert "warning" not in capsys.readouterr().out
