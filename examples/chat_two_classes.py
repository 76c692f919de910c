"""A chat service with two SLO classes on one fleet: does it pay to let the impatient go first?

Azure's conversations are the chat, whose users wait at most a second for a first token; Mooncake's, with prompts of ten
times the length, are documents, which may take twenty. Both run on the same replicas. The fleet is planned under a
queue for all (`fcfs`) and under priorities.

    python examples/chat_two_classes.py [MINUTES] [FILE.jsonl]
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

import traces
from kvsim import plan

SLO = ["chat:ttft_p99=1s,tpot_p99=40ms", "documents:ttft_p99=20s,tpot_p99=80ms"]
TENANTS = {
    "assistant": {"slo_class": "chat", "priority": 1},
    "reader": {"slo_class": "documents", "priority": 0},
}


def merged(minutes: float) -> traces.Trace:
    """The first minutes of both traces; Mooncake's ticks of three seconds are spread."""
    chat, documents = traces.load("azure-2023-conv"), traces.load("mooncake-conversation:spread_s=3")
    parts = [one.head(int(np.searchsorted(one.arrival_s, 60 * minutes))) for one in (chat, documents)]
    return traces.Trace.from_columns(
        name="two-classes",
        **{
            name: np.concatenate([getattr(one, name) for one in parts])
            for name in ("arrival_s", "prompt_tokens", "output_tokens")
        },
        tenant=np.repeat([0, 1], [len(one) for one in parts]),
        tenants=tuple(TENANTS),
    )


def planned(file: Path, scheduler: str) -> dict[str, Any]:
    """The cheapest fleet that holds both classes' bounds under a scheduler; the nearest one where none does."""
    found = plan(
        trace=str(file), model="llama-3.1-8b", gpu="h100-sxm", slo=SLO, tenants=TENANTS, scheduler=scheduler,
        pools=False, seeds=1,
    )  # fmt: skip
    return found.answer or found.nearest or {}


def main() -> None:
    """Plan under both schedulers and print the fleets."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    file = Path(sys.argv[2] if len(sys.argv) > 2 else "two-classes.jsonl")
    traces.write(merged(minutes), file)
    print(f"{'scheduler':<10} {'GPUs':>4} {'$/hour':>7} {'chat TTFT p99':>14} {'documents TTFT p99':>19}  breaks first")
    for scheduler in ("fcfs", "priority"):
        best = planned(file, scheduler)
        chat_s, documents_s = (best["slo"][f"{name}:ttft_p99"]["value_s"] for name in ("chat", "documents"))
        print(
            f"{scheduler:<10} {best['gpus']:>4} {best['usd_per_hour']:>7.2f} {chat_s:>12.2f} s {documents_s:>17.2f} s  "
            f"{best['binding']}"
        )


if __name__ == "__main__":  # simulations run in processes of their own
    main()
