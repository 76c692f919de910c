"""One policy tried on one model, watched from inside and from outside."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from policies import ModelShape, Policy
from policies.plan import Tier
from runtime.audit import Audit
from runtime.offload import offload
from traces.counts import Recording


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a trial did: bytes held and moved by the runtime's own account, those that the audit saw, every step."""

    shape: ModelShape
    recording: Recording
    held_bytes: Counter[Tier]
    moved_bytes: Counter[tuple[Tier, Tier]]
    audited_bytes: Counter[tuple[Tier, Tier]]
    elsewhere_bytes: Counter[tuple[Tier, Tier]]
    violations: Counter[str]


def refusal(model: Any, policy: Policy) -> str | None:
    """Why the runtime does not execute a policy on a model; None when it does."""
    try:
        with offload(model, policy):
            return None
    except ValueError as error:
        return str(error)


def try_policy(model: Any, policy: Policy, *, prompt_tokens: int, new_tokens: int, batch: int, seed: int = 0) -> Trial:
    """Generate `new_tokens` greedily for `batch` random prompts; from the second on, they are padded on the left.

    Raises RuntimeError or ValueError when what the policy's method does is not what its plan says.
    """
    device = model.device
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (batch, prompt_tokens), generator=random)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : min(7 * row, prompt_tokens // 2)] = 0
    with offload(model, policy, max_new_tokens=new_tokens) as kv, Audit(kv) as audit:
        cache = kv.cache()  # without a name it would be gone, and its bytes with it, when `generate` returns
        model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return Trial(
            shape=kv.shape,
            recording=kv.counts,
            held_bytes=kv.footprint_bytes,
            moved_bytes=+kv.moved_bytes,
            audited_bytes=audit.moved_bytes,
            elsewhere_bytes=audit.elsewhere_bytes,
            violations=audit.violations,
        )
