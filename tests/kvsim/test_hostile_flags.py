"""Flags with absurd values: a bound with a reason, at once, in one line."""

from pathlib import Path

import pytest
from fuzz.base import PLAIN
from fuzz.door import attempt_command

SIMULATE = ("simulate", "--trace", "trace.csv", "--model", "llama-3.1-8b", "--gpu", "h100-sxm")
EXPLAIN = ("explain", "--policy", "full")
SYNTH = ("trace", "synth", "--out", "out.csv", "--tenant")


@pytest.mark.parametrize(
    "args",
    [
        *(
            (*SIMULATE, flag, value)
            for flag, value in [
                ("--gpus", "1000000000"),
                ("--gpus", "10^9"),
                ("--tp", "0"),
                ("--tp", "1000000000"),
                ("--pp", "1000000000"),
                ("--seeds", "1000000000"),
                ("--seed", "-1"),
                ("--limit", "-1"),
                ("--limit", "10^30"),
                ("--limit", "nan"),
                ("--rate-scale", "nan"),
                ("--rate-scale", "inf"),
                ("--rate-scale", "0"),
                ("--warmup", "inf"),
                ("--timeout", "nan"),
                ("--max-num-seqs", "9" * 400),
                ("--max-num-batched-tokens", "1e30"),
                ("--gpu-memory-utilization", "nan"),
                ("--gpu-memory-utilization", "-1"),
                ("--host-memory-utilization", "1e300"),
                ("--prefix-cache-ddr", "1e30"),
                ("--prefix-cache-quota", "nan"),
                ("--prompt-token-weight", "inf"),
                ("--output-token-weight", "nan"),
                ("--acceptance", "inf"),
                ("--draft-share", "nan"),
                ("--slo", "ttft=nan"),
                ("--perfetto", "0s-inf"),
                ("--counts", "miss=nan"),
                ("--tenant", "chat:weight=nan"),
                ("--tenant", "chat:weight=1e999"),
                ("--tenant", "chat:priority=" + "9" * 5000),
                ("--tenant", "chat:replicas=" + "9" * 5000),
                ("--slo-class", "a:ttft=inf"),
            ]
        ),
        (*SIMULATE, "--speculate", "1000000000", "--acceptance", "0.5", "--draft-share", "0.1"),
        (*SIMULATE, "--speculate", "4", "--acceptance", "0.5", "--draft-share", "0.1", "--tree", "1000000000"),
        *(
            (*EXPLAIN, flag, value)
            for flag, value in [
                ("--context", "10^30"),
                ("--context", "1e30"),
                ("--context", "0"),
                ("--context", "-1"),
                ("--context", "nan"),
                ("--batch", "1e30"),
                ("--batch", "0"),
                ("--tp", "0"),
                ("--tp", "1000000000"),
                ("--gpu-memory-utilization", "nan"),
                ("--gpu-memory-utilization", "inf"),
                ("--speculate", "1000000000"),
                ("--kv-dtype", "x" * 10_000),
            ]
        ),
        ("explain", "--sp", "1000000000"),
        ("explain", "--pp", "1000000000"),
        ("explain", "--pp", "2", "--micro-batches", "1000000000"),
        ("explain", "--occupancy", "--batch", "1000000000"),
        ("explain", "--occupancy", "--context", "1e30"),
        ("explain", "--density", "--context", "1e30"),
        ("explain", "--plan", "quest", "--context", "1e30"),
        (*SYNTH, "name=a,rate=1", "--requests", "1e18"),
        (*SYNTH, "name=a,rate=nan", "--requests", "5"),
        (*SYNTH, "name=a,rate=1e300", "--duration", "1h"),
        (*SYNTH, "name=a,rate=1,turns=1e300", "--requests", "5"),
        (*SYNTH, "name=a,rate=1,cv=1e-300", "--requests", "5"),
        (*SYNTH, "name=a,rate=1,cv=1e300", "--requests", "5"),
        (*SYNTH, "name=a,rate=1,prompt=fixed:99999999999999", "--requests", "5"),
        (*SYNTH, "name=a,rate=1,prefix=99999999999999", "--requests", "5"),
        (*SYNTH, "name=a,rate=1,think=inf", "--requests", "5"),
        (*SYNTH, "name=a,rate=1,prompt=fixed:9999999", "--requests", "1000", "--block-tokens", "1"),
        (*SYNTH, "name=a,rate=1", "--requests", "5", "--block-tokens", "0"),
        (*SYNTH, "name=a,rate=1", "--requests", "5", "--seed", "-1"),
        ("trace", "info", "trace.csv", "--lru", "0"),
        ("trace", "info", "trace.csv", "--limit", "0"),
        ("trace", "info", "servegen-deepseek-r1:span_s=inf"),
        ("trace", "info", "agentic-coding:session_rate_per_s=1e-320"),
        ("trace", "batching", "trace.csv", "--batch", "0"),
        ("trace", "batching", "trace.csv", "--chunk", "1e30"),
        ("trace", "batching", "trace.csv", "--chunk", "0"),
        ("trace", "batching", "trace.csv", "--tp", "1000000000"),
    ],
    ids=lambda args: " ".join(args)[-60:],
)
def test_an_absurd_value_is_refused_at_once(args: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(PLAIN, encoding="utf-8")
    assert attempt_command(args, tmp_path) == "refused"


@pytest.mark.parametrize("arrival_s", ["1e30", "1.7e12", "1e300"])
def test_an_arrival_so_late_that_latencies_would_be_lost(arrival_s: str, tmp_path: Path) -> None:
    """Beside 1e30 s a second is nothing, and every latency 0. Unix time in milliseconds is the usual cause."""
    (tmp_path / "trace.csv").write_text(f"arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,7\n{arrival_s},5,7\n")
    assert attempt_command(SIMULATE, tmp_path) == "refused"
