"""Text from a prompt under a policy, as it comes, with the time of each token."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import TextStreamer

from policies import Step
from policies.plan import Tier
from runtime.cache import TieredCache
from runtime.offload import Offload


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What came out, when, and what the cache held then: `tpot_s` is the median time of the tokens after the first."""

    text: str
    tokens: list[int]
    ttft_s: float
    tpot_s: float | None
    held_bytes: Counter[Tier]


class _Stream(TextStreamer):
    """Hands on finished words, and notes when each token came."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self.tokens: list[int] = []
        self.came_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if not self.next_tokens_are_prompt:
            self.came_s.append(perf_counter())
            self.tokens += value.tolist()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on what will not change any more."""
        self._show(text)


def encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    """The ids of a prompt, (1, tokens); ValueError when it has none."""
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    if not ids.numel():
        raise ValueError("the prompt is empty; give it at least one token")
    return ids


def generate_text(
    kv: Offload,
    tokenizer: Any,
    ids: torch.Tensor,
    *,
    prefill_chunk_tokens: int | None = None,
    show: Callable[[str], None],
    progress: Callable[[int], None],
) -> Generated:
    """Decode greedily after the prompt `ids`, (1, tokens), at most as many tokens as `kv` has room for.

    `show` gets the text as it comes, `progress` how many tokens of the prompt have gone through the model.
    """
    cache = kv.cache(prompt_tokens=ids.shape[1])
    cache.progress = _prompt_progress(cache, progress)
    text: list[str] = []

    def hand_on(piece: str) -> None:
        text.append(piece)
        show(piece)

    stream = _Stream(tokenizer, hand_on)
    ids = ids.to(kv.model.device)
    began_s = perf_counter()
    kv.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=kv.max_new_tokens,
        prefill_chunk_size=prefill_chunk_tokens,
        do_sample=False,
        streamer=stream,
    )
    gaps_s = [later - earlier for earlier, later in zip(stream.came_s, stream.came_s[1:], strict=False)]
    return Generated(
        text="".join(text),
        tokens=stream.tokens,
        ttft_s=stream.came_s[0] - began_s,
        tpot_s=median(gaps_s) if gaps_s else None,
        held_bytes=kv.footprint_bytes,
    )


def _prompt_progress(cache: TieredCache, progress: Callable[[int], None]) -> Callable[[Step], None]:
    done = 0  # tokens, once for each layer

    def told(step: Step) -> None:
        nonlocal done
        if step.prefilling:
            done += step.new_tokens
            progress(done // len(cache.own))

    return told
