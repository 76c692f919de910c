"""`plan`: from a trace and an SLO to the cheapest fleet, as an object for notebooks and a document for machines."""

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.planning.candidates import candidates
from kvsim.planning.document import document_of, first_answer
from kvsim.planning.findings import Estimate
from kvsim.planning.measured import Ask
from kvsim.planning.planner import Planner
from kvsim.planning.question import MOST_GPUS, Measured, Question, question_of
from kvsim.planning.simulations import Simulations
from kvsim.planning.slo import members
from kvsim.planning.what_if import WhatIf, price_row


class Plan:
    """What came of a plan: `to_dict()` is what `kvsim plan --json` prints, `answer` the chosen fleet, None if none."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    @property
    def answer(self) -> dict[str, Any] | None:
        """The cheapest fleet that holds the SLO."""
        found: dict[str, Any] | None = self._document["answer"]
        return found

    @property
    def nearest(self) -> dict[str, Any] | None:
        """The fleet that comes nearest where none holds the SLO."""
        found: dict[str, Any] | None = self._document.get("nearest")
        return found

    @property
    def plans(self) -> list[dict[str, Any]]:
        """The best fleet of each GPU, policy and cache, the cheapest first, then those that do not hold."""
        found: list[dict[str, Any]] = self._document["plans"]
        return found

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        return str(self._document["sentence"])

    def to_dict(self) -> dict[str, Any]:
        """The whole document."""
        return self._document

    def to_pandas(self) -> Any:
        """`plans` as a table, a row for each; pandas must be installed."""
        return import_module("pandas").json_normalize(self.plans)

    def __repr__(self) -> str:
        return f"Plan: {self.sentence}"


def plan(
    *,
    slo: str | Sequence[str],
    gpu: str | Sequence[str] | None = None,
    policy: str | Sequence[str] | None = None,
    prices: str | Path | None = None,
    quality: str | Path | None = None,
    max_gpus: int = MOST_GPUS,
    pools: bool = True,
    scenario: str | Path | None = None,
    allow_code: bool = False,
    calibrate_from: str | Path | None = None,
    calibrate_tp: int = 0,
    calibrate_replicas: int = 1,
    first: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Plan:
    """The fewest GPUs, of which kind and under which policy, that serve a trace within an SLO.

    `options` are those of a scenario by its keys (`trace`, `model`, `tp`, `tenants`, ...): what is given is fixed, and
    `gpus` asks for the best fleet of that size. `slo` is as `ttft_p99=10s,tpot_p99=100ms` (or a list of such),
    `prices` and `quality` are files in place of the package's. `calibrate_from` are records of a server's clients, to
    which serving constants are fitted; it had so many replicas of `calibrate_tp` GPUs (0: those of `tp`). `first` is
    told the estimate by closed forms before any simulation. Simulations run in processes of their own: a script needs
    `if __name__ == "__main__":`. Raises ValueError for what is asked wrongly; a plan that no fleet meets is no error,
    its `answer` is None.
    """
    began_s = time.perf_counter()
    question = question_of(
        slo=slo,
        gpu=gpu,
        policy=policy,
        prices=prices,
        quality=quality,
        max_gpus=max_gpus,
        pools=pools,
        scenario=scenario,
        allow_code=allow_code,
        options=options,
        measured=None if calibrate_from is None else Measured(str(calibrate_from), calibrate_tp, calibrate_replicas),
    )
    return Plan(answered(question, began_s, first))


def answered(
    question: Question,
    began_s: float,
    first: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int], None] = lambda _ended: None,
) -> dict[str, Any]:
    """The document of a plan; after Ctrl-C what was found by then, `partial`, where anything was.

    `progress` is told how many simulations have ended.
    """
    asked = question.asked
    traces = asked.load_traces()
    trace = traces[0]
    of_class = members(asked.setup["tenants"], trace.tenants, question.objectives)
    could = candidates(asked, question.gpus, question.prices, trace, question.class_bounds())
    ask = Ask(
        objectives=question.objectives,
        of_class=of_class,
        bounds=question.bounds,
        warmup_s=asked.warmup,
    )
    fixed = asked.setup["gpus"] if "gpus" in asked.given else None
    interrupted = False
    estimate: dict[str, Any] | None = None
    with Simulations(could.families, traces, ask, progress) as simulations:
        planner = Planner(
            simulations,
            traces,
            question.objectives,
            question.most_gpus,
            fixed,
            question.pools,
            asked.seed,
        )

        def tell(one: Estimate) -> None:
            nonlocal estimate
            estimate = first_answer(could.families[one.family], one, time.perf_counter() - began_s)
            if first is not None:
                first(estimate)

        try:
            planner.run(tell)
        except KeyboardInterrupt:
            if not planner.found.brackets:
                raise
            interrupted = True
        others = WhatIf(ask, question.most_gpus, fixed, lambda ended: progress(simulations.made + ended))
    try:
        if not interrupted:
            others.run(planner, trace)
    except KeyboardInterrupt:
        interrupted = True
    context = int(np.median(trace.prompt_tokens))
    document = document_of(question, planner, could, traces, context)
    priced = [price_row(document["answer"], document["plans"])] if others.rows else []
    return {
        **document,
        "sensitivity": [*others.rows, *priced],
        "first_answer": estimate,
        "partial": interrupted,
        "simulations": simulations.made + others.made,
        "simulations_cpu_s": simulations.cpu_s + others.cpu_s,
        "wall_s": time.perf_counter() - began_s,
    }
