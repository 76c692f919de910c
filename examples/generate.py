"""Plug a policy into Hugging Face's `generate`: the same tokens, with the cache in host memory.

python examples/generate.py [POLICY]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from policies import parse_policy
from runtime import offload


def main(policy: str = "offload-all") -> None:
    """Generate with a tiny random model, under the policy and without it."""
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
    model = AutoModelForCausalLM.from_config(config).eval()  # or AutoModelForCausalLM.from_pretrained(...)
    prompt = torch.randint(256, (1, 500))
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    stock = model.generate(**inputs, max_new_tokens=20, do_sample=False)

    with offload(model, parse_policy(policy), max_new_tokens=20) as kv:
        cache = kv.cache()
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
        print("holds", ", ".join(f"{nbytes:,} bytes in {tier}" for tier, nbytes in sorted(kv.footprint_bytes.items())))
        for (src, dst), nbytes in sorted(kv.moved_bytes.items()):
            print(f"moved {nbytes:,} bytes {src}->{dst}")
    same = int((out == stock)[0, 500:].sum())
    print(f"{same} of 20 tokens as without the policy: {out[0, 500:].tolist()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
