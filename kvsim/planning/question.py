"""What a plan is asked: a scenario, what may be bought, what must hold; checked before a trace is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from kvsim.planning.prices import Prices
from kvsim.planning.quality import Qualities
from kvsim.planning.slo import Objective, classes, parse_slo, request_bounds
from kvsim.scenario.scenario_file import Scenario, load_scenario
from policies.shown import shown

MOST_GPUS = 1024
SEEDS = 5
_UNPLANNED = {
    "perfetto": "a plan keeps no operations; give it to the kvsim simulate that the plan names",
    "prefill_gpus": "the planner chooses it; fix tp, pp or gpus, or leave it out",
}


class Measured(NamedTuple):
    """A file of clients' records, and the fleet that they are of: `tp` 0 is the scenario's."""

    file: str
    tp: int = 0
    replicas: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a plan is asked: the scenario, what may be bought, and what it must hold."""

    asked: Scenario
    given: Mapping[str, Any]  # the options as they were given
    scenario: str | None  # the file that they stand on top of
    gpus: tuple[str, ...]
    objectives: tuple[Objective, ...]
    prices: Prices
    qualities: Qualities
    most_gpus: int
    pools: bool
    calibration: Mapping[str, Any] | None = None  # how well records tell the serving constants among `given`

    @property
    def bounds(self) -> dict[str, float]:
        """What a request of no class must keep."""
        return request_bounds(self.objectives, None)

    def notes(self) -> list[str]:
        """What was read in another way than it was written."""
        return [*self.asked.load_model().notes, *(self.calibration["warnings"] if self.calibration else ())]

    def class_bounds(self) -> dict[str, dict[str, float]]:
        """What a request of each class that tenants have must keep: the plan's bounds in place of a scenario's."""
        have = {one.slo_class for one in self.asked.setup["tenants"].values()}
        own = {name: request_bounds(self.objectives, name) for name in classes(self.objectives) if name in have}
        return {**self.asked.setup["slo_classes"], **own}


def question_of(
    *,
    slo: str | Sequence[str],
    gpu: str | Sequence[str] | None,
    policy: str | Sequence[str] | None,
    prices: str | Path | None,
    quality: str | Path | None,
    max_gpus: int,
    pools: bool,
    scenario: str | Path | None,
    allow_code: bool,
    options: Mapping[str, Any],
    measured: Measured | None = None,
    progress: Callable[[int], None] = lambda _ended: None,
) -> Question:
    """What is asked, checked as far as it can be before a trace is read.

    `measured` are records of a server that serving constants are fitted to first; `progress` is told how many
    simulations that has taken.
    """
    objectives = parse_slo(slo)
    for key, reason in _UNPLANNED.items():
        if key in options and reason:
            raise ValueError(f"{key}: {reason}")
    if max_gpus < 1:
        raise ValueError(f"max_gpus={max_gpus} must be at least 1")
    given = dict(options)
    gpus = _several(gpu)
    if gpus:
        given["gpu"] = gpus[0]
    if policy is not None:
        given["policy"] = _several(policy)
    bounds = {one.removesuffix("_s"): limit_s for one, limit_s in request_bounds(objectives, None).items()}
    given["slo"] = bounds
    asked = load_scenario(given, None if scenario is None else Path(scenario), allow_code=allow_code)
    if "prefill_gpus" in asked.given:
        raise ValueError(f"prefill_gpus: {_UNPLANNED['prefill_gpus']}")
    replica = asked.setup["tp"] * asked.setup["pp"]
    if {"gpus", "tp"} <= asked.given and asked.setup["gpus"] % replica:
        raise ValueError(f"gpus={asked.setup['gpus']} is not a multiple of the {replica} GPUs of a replica (tp x pp)")
    calibration = None
    if measured is not None:
        calibration = _calibration(asked, gpus or [asked.gpu], measured, progress)
        given |= calibration["constants"]
        asked = load_scenario(given, None if scenario is None else Path(scenario), allow_code=allow_code)
    if "seeds" not in asked.given:
        asked = replace(asked, seeds=SEEDS)
    return Question(
        asked=asked,
        given=given,
        scenario=None if scenario is None else str(scenario),
        gpus=tuple(dict.fromkeys(gpus or [asked.gpu])),
        objectives=objectives,
        prices=Prices(None if prices is None else Path(prices)),
        qualities=Qualities(None if quality is None else Path(quality)),
        most_gpus=max_gpus,
        pools=pools,
        calibration=calibration,
    )


def _calibration(
    asked: Scenario, gpus: Sequence[str], measured: Measured, progress: Callable[[int], None]
) -> dict[str, Any]:
    """What the records of the fleet that was measured tell of the constants that the plan's fleets will have."""
    from kvsim.observed.calibration import calibrated  # few plans are asked with records

    if len(set(gpus)) > 1:
        raise ValueError(
            f"calibrate_from={shown(measured.file)}: records of one server say nothing of {len(set(gpus))} kinds of "
            "GPU; plan with the --gpu that was measured"
        )
    tp = measured.tp or asked.setup["tp"]
    fleet = {**asked.setup, "tp": tp, "gpus": tp * asked.setup["pp"] * measured.replicas, "prefill_gpus": 0}
    (setup,) = replace(asked, setup=fleet, policy=("full",), seeds=1).setups()
    return calibrated(measured.file, setup, dict.fromkeys(asked.given), progress)


def _several(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
