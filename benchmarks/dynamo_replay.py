"""One replay by NVIDIA Dynamo's simulator (`ai-dynamo-runtime`), timed: a request trace in, one line of JSON out.

    python benchmarks/dynamo_replay.py benchmarks/workloads/W1_conv2k_qps6.45.csv 1 26000

Arguments are the trace, the replicas and the KV blocks of each; the rest is as in `benchmarks/simulator.py`. Runs in an
interpreter of its own, which needs that package and not kvsim. Its CPU seconds are those of the call that replays.
"""

import csv
import json
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from dynamo._core import MockEngineArgs, run_mocker_trace_replay

BLOCK_TOKENS = 16  # of its engine
ID_TOKENS = 512  # that one id of the trace stands for


def as_mooncake(trace: Path, out: Path) -> None:
    """Write a CSV of lengths as Mooncake's JSONL, in which no two prompts have a block in common."""
    known = 0
    with trace.open() as rows, out.open("w") as lines:
        for row in csv.DictReader(rows):
            prompt_tokens = int(row["num_prefill_tokens"])
            blocks = -(-prompt_tokens // ID_TOKENS)
            request = {
                "timestamp": 1000 * float(row["arrived_at"]),
                "input_length": prompt_tokens,
                "output_length": int(row["num_decode_tokens"]),
                "hash_ids": [*range(known, known + blocks)],
            }
            lines.write(json.dumps(request) + "\n")
            known += blocks


def main() -> None:
    """Replay the trace named on the command line."""
    trace, replicas, kv_blocks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    engine = MockEngineArgs(
        num_gpu_blocks=kv_blocks,
        block_size=BLOCK_TOKENS,
        max_num_seqs=512,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )
    with TemporaryDirectory() as folder:
        lines = Path(folder) / "trace.jsonl"
        as_mooncake(trace, lines)
        began_s, wall_s = time.process_time(), time.perf_counter()
        report = run_mocker_trace_replay(
            [lines], extra_engine_args=engine, num_workers=replicas, trace_block_size=ID_TOKENS
        )
        cpu_s, wall_s = time.process_time() - began_s, time.perf_counter() - wall_s
    figures = {
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "requests": report["completed_requests"],
        "output_tokens": report["total_output_tokens"],
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
