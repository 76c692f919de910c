"""A figure that is no number is refused by name, wherever it stands, before anything is made with it."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from simulated import GPU, HOST, MODEL, setup

from kvsim.scenario.finite import first_nan
from policies import Full


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned(Full):
    """A policy from outside, which checks nothing."""

    shares: tuple[float, ...] = (0.5,)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"gpu": replace(GPU, rates=replace(GPU.rates, hbm_Bps=math.nan))}, "gpu.rates.hbm_Bps"),
        (
            {"gpu": replace(GPU, rates=replace(GPU.rates, gather_curve=((256, 1e9), (512, math.nan))))},
            "gpu.rates.gather_curve.1.1",
        ),
        ({"counts": {"miss": math.nan}}, "counts.miss"),
        ({"slo_classes": {"chat": {"ttft_s": math.nan}}}, "slo_classes.chat.ttft_s"),
        ({"policy": Tuned(shares=(0.1, math.nan))}, "policy.shares.1"),
        ({"timeout_s": math.nan}, "timeout_s"),
    ],
)
def test_what_is_no_number_is_refused(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ValueError, match=rf"^{where}=nan is no number"):
        replace(setup(), **changes)


def test_numbers_are_numbers() -> None:
    assert first_nan((MODEL, GPU, HOST, [1, 1.5, math.inf, None, "nan", {"a": True}])) is None
