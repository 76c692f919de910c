"""Mutated tenants of scenario files and of flags: weights, priorities, classes, quotas, replicas, patterns."""

import random
from pathlib import Path
from typing import Any

from fuzz import mutate
from fuzz.base import SCENARIO, simulation, write_trace
from fuzz.door import attempt_command
from fuzz.scenarios import simulate

TENANTS: dict[str, Any] = {
    "tenants": {
        "chat": {"weight": 2, "priority": 1, "slo_class": "fast", "quota": 0.5},
        "co*": {"replicas": "0-0", "timeout": "30s"},
    },
    "slo_classes": {"fast": {"ttft": "2s", "tpot": "60ms"}},
}
FLAGS = ("chat:weight=2,priority=1", "co*:quota=0.5", "code:timeout=30s,replicas=0", "chat:slo_class=fast")


def attempt(rng: random.Random, folder: Path) -> str:
    """Try one mutated set of tenants, as a file or as flags."""
    if rng.random() < 0.6:
        write_trace(folder)
        scheduler = rng.choice(("fcfs", "fair", "priority"))
        return simulate(rng, folder, {**SCENARIO, "scheduler": scheduler, **mutate.document(rng, TENANTS, 1)})
    args = [*simulation(rng, folder), "--scheduler", rng.choice(("fair", "priority"))]
    for flag in mutate.some(rng, FLAGS) or FLAGS[:1]:
        args += ["--tenant", mutate.text_like(rng, flag) if rng.random() < 0.7 else flag]
    if rng.random() < 0.5:
        args += ["--slo-class", mutate.text_like(rng, "fast:ttft=2s,tpot=60ms")]
    return attempt_command(args, folder)
