"""What a policy will move, predicted before it runs, beside what it did move, and beside the recorded run replayed.

python examples/predicted_bytes.py [POLICY ...]
"""

import sys
from collections import Counter

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kvsim import replay_moved_bytes
from policies import ModelShape, Policy, Step, parse_policy, plan_layer
from policies.plan import moved_bytes
from runtime import offload

POLICIES = ("offload-all", "shadowkv:budget_tokens=128,rank=16,outlier_chunks=4")
PROMPT, NEW = 500, 20


def predicted(policy: Policy, model: ModelShape) -> Counter:
    """The plans of the prompt and of each token fed back; what data decide is at the policy's default."""
    steps = [Step(prompt_tokens=PROMPT, past_tokens=0, new_tokens=PROMPT)]
    steps += [Step.decoding(PROMPT, generated) for generated in range(1, NEW)]
    moved: Counter = Counter()
    for step in steps:
        for layer in range(model.n_layers):
            plan = plan_layer(policy, model, step, layer)
            expected = {count.name: count.expected() for count in plan.counts}
            moved.update(moved_bytes(plan.ops, plan.buffers, expected))
    return moved


def main(*policies: str) -> None:
    """Run each policy on a tiny random model, and compare."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.randint(256, (1, PROMPT))
    for text in policies or POLICIES:
        with offload(model, parse_policy(text), max_new_tokens=NEW) as kv:
            options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "do_sample": False}
            model.generate(prompt, past_key_values=kv.cache(), **options)
            before, after = predicted(kv.policy, kv.shape), replay_moved_bytes(kv.counts, kv.policy, kv.shape)
            print(text)
            for link, nbytes in sorted(kv.moved_bytes.items()):
                print(f"  {'->'.join(link)}: predicted {before[link]:,}, moved {nbytes:,}, replayed {after[link]:,}")
            for name, share in kv.counts.shares().items():
                print(f"  {name}: {share:.0%} of its maximum in this run")


if __name__ == "__main__":
    main(*sys.argv[1:])
