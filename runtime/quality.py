"""What a policy changes in a model's predictions on a text: the same tokens are fed with full attention and with it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policies import Policy
from policies.plan import Tier
from runtime.offload import offload
from traces.counts import Recording


@dataclass(frozen=True, slots=True, kw_only=True)
class Passages:
    """`context_tokens` of a text at each of several places, and the `new_tokens` that follow: ids (places, tokens)."""

    ids: Tensor
    context_tokens: int
    new_tokens: int

    @property
    def followed_by(self) -> Tensor:
        """The tokens to predict, (places, new_tokens)."""
        return self.ids[:, self.context_tokens :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One policy against full attention, a figure for each place, as means over the predicted tokens.

    `kl_nats`: Kullback-Leibler divergence of full attention's prediction from the policy's; `nll_nats`: by how much
    the text's own token is less likely, in logs; `top1_share`: how often both think one token likeliest. `held_bytes`
    and `moved_bytes` (of host memory, for each token decoded) are those of one sequence.
    """

    kl_nats: list[float]
    nll_nats: list[float]
    top1_share: list[float]
    held_bytes: dict[Tier, int]
    moved_bytes_per_token: float
    recording: Recording


def passages(tokenizer: Any, text: str, context_tokens: int, new_tokens: int, places: int) -> Passages:
    """Cut a text's tokens at `places` spread evenly over it; each begins as the tokenizer begins a text.

    Raises ValueError where the text is too short for a context, or for that many places without predicting the same
    tokens twice.
    """
    words = tokenizer(text, add_special_tokens=False).input_ids
    begins = _beginning(tokenizer)
    needed = context_tokens - len(begins) + new_tokens
    spare = len(words) - needed
    if spare < 0:
        raise ValueError(
            f"the text has {len(words):,} tokens, and a context of {context_tokens:,} with {new_tokens:,} that follow "
            f"needs {needed:,}; give a longer text or a shorter --context"
        )
    if places > 1 and spare < (places - 1) * new_tokens:
        raise ValueError(
            f"the text has {len(words):,} tokens: at {places} places the same ones would be predicted twice with a "
            f"context of {context_tokens:,}; use {spare // new_tokens + 1} or fewer, or a longer text"
        )
    starts = [spare * place // (places - 1) for place in range(places)] if places > 1 else [spare // 2]
    rows = [[*begins, *words[start : start + needed]] for start in starts]
    return Passages(ids=torch.tensor(rows), context_tokens=context_tokens, new_tokens=new_tokens)


def _beginning(tokenizer: Any) -> list[int]:
    """The special token that the tokenizer puts before a text, if any: without it a model sees what it never saw."""
    first = tokenizer("a").input_ids[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def full_logits(model: Any, passages: Passages) -> Tensor:
    """What the stock model predicts at each token to come, fp32 (places, new_tokens, vocabulary), in host memory.

    Raises ValueError for logits that are no numbers, and for a context beyond the model's positions.
    """
    _check_positions(model, passages)
    ids, context = passages.ids.to(model.device), passages.context_tokens
    rows = []
    with torch.no_grad():
        for row in ids.split(1):  # one by one, as full attention over a long context fills a small memory
            read = model(row[:, :context], logits_to_keep=1)
            logits = [read.logits]
            if passages.new_tokens > 1:
                logits.append(model(row[:, context:-1], past_key_values=read.past_key_values).logits)
            rows.append(torch.cat(logits, dim=1).float().cpu())
    return _finite(torch.cat(rows), "full attention")


def measure(
    model: Any, policy: Policy, passages: Passages, full: Tensor, progress: Callable[[int], None] = lambda _done: None
) -> Quality:
    """Feed the passages token by token under a policy and compare with `full_logits`.

    `progress` is told how many tokens of each passage are done. Raises ValueError for logits that are no numbers, and
    what `offload` raises.
    """
    ids, context = passages.ids.to(model.device), passages.context_tokens
    with torch.no_grad(), offload(model, policy, max_new_tokens=passages.new_tokens) as kv:
        cache = kv.cache(prompt_tokens=context)
        rows = [model(ids[:, :context], past_key_values=cache, logits_to_keep=1).logits.float().cpu()]
        progress(context)
        before = kv.moved_bytes.copy()
        for token in range(context, ids.shape[1] - 1):
            rows.append(model(ids[:, token : token + 1], past_key_values=cache).logits.float().cpu())
            progress(token + 1)
        moved = kv.moved_bytes - before
        decoded = len(ids) * max(1, ids.shape[1] - 1 - context)
        held = {tier: nbytes // len(ids) for tier, nbytes in kv.footprint_bytes.items()}
        recording = kv.counts
    logits = _finite(torch.cat(rows, dim=1), policy.name)
    kl, nll, top1 = _compared(full, logits, passages.followed_by)
    return Quality(
        kl_nats=kl,
        nll_nats=nll,
        top1_share=top1,
        held_bytes=held,
        moved_bytes_per_token=sum(n for link, n in moved.items() if Tier.DDR in link) / decoded,
        recording=recording,
    )


def _compared(full: Tensor, other: Tensor, tokens: Tensor) -> Iterator[list[float]]:
    """Divergence, loss of likelihood and agreement of each passage, in float64, a passage at a time."""
    rows: list[Sequence[float]] = []
    for here, there, token in zip(full, other, tokens.cpu(), strict=True):
        p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (here, there))
        kl = (p.exp() * (p - q)).sum(dim=-1)
        nll = (p - q).gather(1, token[:, None])
        rows.append([float(x) for x in (kl.mean(), nll.mean(), (here.argmax(-1) == there.argmax(-1)).double().mean())])
    return (list(column) for column in zip(*rows, strict=True))


def _check_positions(model: Any, passages: Passages) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and passages.ids.shape[1] > most:
        raise ValueError(
            f"a context of {passages.context_tokens:,} and {passages.new_tokens:,} new tokens exceed the {most:,} "
            "positions of the model; use a shorter --context"
        )


def _finite(logits: Tensor, by: str) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"the model's logits under {by} are not all numbers; try --dtype bf16 or fp32")
    return logits
