"""The valid inputs that mutations start from, and the small commands that use them."""

import random
from pathlib import Path

PLAIN = (
    "arrived_at,num_prefill_tokens,num_decode_tokens,tenant,session,block_tokens,hash_ids\n"
    "0,40,3,chat,1,16,1 2\n0.5,33,2,code,2,16,1 5\n2,50,1,chat,1,16,1 2 3\n"
)
SCENARIO = {
    "trace": "trace.csv",
    "limit": 3,
    "model": "llama-3.1-8b",
    "gpu": "h100-sxm",
    "gpus": 1,
    "policy": "full",
}


def write_trace(folder: Path) -> str:
    """The plain trace of three requests and two tenants, in the folder; its name."""
    (folder / "trace.csv").write_text(PLAIN, encoding="utf-8")
    return "trace.csv"


def simulation(rng: random.Random, folder: Path) -> list[str]:
    """The arguments of a small simulation; one in four writes its results."""
    args = ["simulate", "--trace", write_trace(folder), "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--limit", "3"]
    return [*args, *rng.choice(([], ["--json"], ["--out", "out"], []))]
