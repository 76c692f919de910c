"""What a decode step costs the host beside the arithmetic: planning per layer and token, and a whole step.

A Llama of 32 layers so small that its kernels take next to nothing, on the CPU, one thread, a prompt of 4,096 tokens:
`plan_us` is `plan_layer`, `bound_us` the same answer from a bound layer, whose 32 layers share what is alike;
the runtime asks for either twice a layer and token (for itself and for what may begin before it). `step_ms` is the
median of whole forwards of one token. All are CPU seconds of the process, so that neighbours matter little.

    python benchmarks/decode_overhead.py [--steps 200] [--out FILE]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from policies import Step, parse_policy, plan_layer, settle
from runtime import offload
from runtime.arena import Arena
from runtime.bound import BoundLayer
from runtime.derived import Plans
from runtime.methods import method_of
from runtime.offload import Offload

OUT = Path(__file__).parent / "results" / "decode_overhead.json"
LAYERS, PROMPT = 32, 4096
POLICIES = ("full", "quest", "shadowkv", "retrieval-attention:index=flat", "full@heads=1+shadowkv@heads=1")


def tiny() -> transformers.PreTrainedModel:
    """32 layers of 2 heads of 16, in fp32, with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2 * PROMPT,
        eos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def per_layer_us(step: Callable[[int], None], steps: int) -> float:
    """Median CPU microseconds of a layer, where `step` does all layers for one output token."""
    times = []
    for generated in range(1, steps + 1):
        began = time.process_time()
        step(generated)
        times.append(time.process_time() - began)
    return statistics.median(times[steps // 10 :]) / LAYERS * 1e6


def planning(kv: Offload, steps: int) -> dict[str, float]:
    """Microseconds per layer to learn a step's plan: planned afresh, and from bound layers."""
    policies = [settle(kv.policy, kv.shape, PROMPT, layer) for layer in range(LAYERS)]
    arena, plans = Arena(torch.device("cpu"), 1), Plans(kv.shape)
    for layer, policy in enumerate(policies):
        arena.allocate(layer, plan_layer(policy, kv.shape, Step.decoding(PROMPT, steps), layer).buffers)
    bound = [BoundLayer(plans.of(policy, i), method_of(policy), i) for i, policy in enumerate(policies)]

    def afresh(generated: int) -> None:
        step = Step.decoding(PROMPT, generated)
        for layer, policy in enumerate(policies):
            plan_layer(policy, kv.shape, step, layer)

    def from_bound(generated: int) -> None:
        step = Step.decoding(PROMPT, generated)
        for layer in bound:
            layer.at(step, arena)

    return {"plan_us": per_layer_us(afresh, steps), "bound_us": per_layer_us(from_bound, steps)}


def whole_step_ms(model: transformers.PreTrainedModel, kv: Offload, steps: int) -> float:
    """Median CPU milliseconds of a forward of one token."""
    cache, times = kv.cache(), []
    model(torch.arange(PROMPT)[None] % 128, past_key_values=cache)
    for token in range(steps):
        began = time.process_time()
        model(torch.tensor([[token % 128]]), past_key_values=cache)
        times.append(time.process_time() - began)
    return statistics.median(times[steps // 10 :]) * 1e3


def main() -> None:
    """Measure every policy, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model, rows = tiny(), []
    for text in POLICIES:
        with offload(model, parse_policy(text), max_new_tokens=asked.steps) as kv, torch.inference_mode():
            row = {"policy": text, **planning(kv, asked.steps), "step_ms": whole_step_ms(model, kv, asked.steps)}
        rows.append({name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()})
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    about = {
        "schema_version": 1,
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "torch": version("torch"),
        "transformers": version("transformers"),
        "layers": LAYERS,
        "prompt_tokens": PROMPT,
        "steps": asked.steps,
    }
    asked.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
