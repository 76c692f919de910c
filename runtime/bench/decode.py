"""Decode steps under a policy, timed: in a loop of one's own and in `generate`."""

import gc
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers import DynamicCache, StaticCache, StoppingCriteria

from policies import Policy
from policies.plan import Tier
from runtime.calibration.device import driver
from runtime.offload import offload

SETTLING = 4  # steps before those that are timed: kernels are compiled in the first, a graph is captured in the second


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What was measured of one policy, or of one cache of Transformers.

    `tpot_s` are times of single steps in a loop of one's own, in their order; `generate_tpot_s` those in `generate`,
    empty where it was not run. `moved_bytes` are those of the loop, its first steps included. `ttft_s` is None where
    the cache was filled without a prompt. `counts` are the shares that data decided, `eager` why steps were not
    replayed.
    """

    way: str
    prompt_tokens: int
    batch: int
    ttft_s: float | None
    tpot_s: list[float]
    peak_hbm_bytes: int
    generate_tpot_s: list[float] = field(default_factory=list)
    held_bytes: Counter[Tier] = field(default_factory=Counter)
    moved_bytes: Counter[tuple[Tier, Tier]] = field(default_factory=Counter)
    counts: dict[str, float] = field(default_factory=dict)
    replayed: int = 0
    eager: dict[str, int] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of the loop, the first ones included."""
        return SETTLING + len(self.tpot_s)

    @property
    def median_s(self) -> float:
        """The median step."""
        return median(self.tpot_s)

    @property
    def mean_s(self) -> float:
        """The mean step, which is what the mean counts explain."""
        return fmean(self.tpot_s)


def time_policy(
    model: Any,
    policy: Policy,
    *,
    way: str,
    prompt_tokens: int,
    batch: int,
    steps: int,
    capture: bool,
    generate_steps: int = 0,
    chunk_tokens: int | None = None,
    token_every: int | None = None,
) -> Timed:
    """Process a random prompt under `policy`, then decode: `steps` in a loop, `generate_steps` in `generate`.

    The loop feeds the likeliest token, or a random one for `token_every` steps each: then queries are alike, and
    policies that keep what they chose find it again, which the greedy tokens of random weights do not let them.
    Raises MemoryError when it does not fit.
    """
    device = model.device
    ids = torch.randint(model.config.vocab_size, (batch, prompt_tokens), device=device)
    room = SETTLING + steps + generate_steps + 1
    _reset_peak(device)
    with torch.inference_mode(), offload(model, policy, max_new_tokens=room, capture=capture) as kv:
        cache = kv.cache(prompt_tokens=prompt_tokens)
        began_s = _now_s(device)
        for part in ids.split(chunk_tokens or prompt_tokens, dim=1):
            out = model(part, past_key_values=cache, logits_to_keep=1)
        ttft_s = _now_s(device) - began_s
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        before = kv.moved_bytes
        fed, times = _loop(model, token, cache, SETTLING + steps, token_every)
        moved = kv.moved_bytes - before
        generated = _generate(model, torch.cat([ids, *fed], dim=1), cache, generate_steps)
        return Timed(
            way=way,
            prompt_tokens=prompt_tokens,
            batch=batch,
            ttft_s=ttft_s,
            tpot_s=times[SETTLING:],
            generate_tpot_s=generated,
            held_bytes=kv.footprint_bytes,
            moved_bytes=moved,
            counts=kv.counts.shares(),
            replayed=kv.replays.replayed,
            eager=dict(kv.replays.eager),
            peak_hbm_bytes=_peak_hbm_bytes(device),
        )


CACHES: dict[str, Callable[[Any, int], Any]] = {  # of Transformers, for a model and the most tokens
    "hf-dynamic": lambda model, _: DynamicCache(config=model.config),
    "hf-static": lambda model, tokens: StaticCache(config=model.config, max_cache_len=tokens),
    "hf-offloaded": lambda model, _: DynamicCache(config=model.config, offloading=True),
}


def time_cache(model: Any, way: str, *, prompt_tokens: int, batch: int, steps: int) -> Timed:
    """Decode with a cache of Transformers that was filled with random keys and values, without a prompt.

    Raises MemoryError when it does not fit.
    """
    try:
        return _time_cache(model, way, prompt_tokens, batch, steps)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{way} does not fit: {str(error).splitlines()[0]}") from error


def _time_cache(model: Any, way: str, prompt_tokens: int, batch: int, steps: int) -> Timed:
    device, config = model.device, model.config
    _reset_peak(device)
    cache = CACHES[way](model, prompt_tokens + SETTLING + steps + 1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, prompt_tokens, head_dim)
    with torch.inference_mode():
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(shape, dtype=model.dtype, device=device) for _ in range(2))
            cache.update(k, v, layer)
            del k, v
        token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        _, times = _loop(model, token, cache, SETTLING + steps)
    return Timed(
        way=way,
        prompt_tokens=prompt_tokens,
        batch=batch,
        ttft_s=None,
        tpot_s=times[SETTLING:],
        peak_hbm_bytes=_peak_hbm_bytes(device),
    )


def machine(model: Any) -> dict[str, str]:
    """What a model runs on, and with which software."""
    cuda = model.device.type == "cuda"
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if cuda else f"CPU, {platform.machine()}",
        **({"driver": driver()} if cuda else {}),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _loop(
    model: Any, token: torch.Tensor, cache: Any, steps: int, token_every: int | None = None
) -> tuple[list[torch.Tensor], list[float]]:
    """Decode, never waiting for the device: the tokens fed, and the seconds between the ends of steps."""
    marks, fed = [_mark(model.device)], []
    for step in range(steps):
        fed.append(token)
        likeliest = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        if token_every is None:
            token = likeliest
        elif step % token_every == 0:
            token = torch.randint_like(token, model.config.vocab_size)
        marks.append(_mark(model.device))
    fed.append(token)
    _now_s(model.device)
    return fed, [_between_s(*pair) for pair in pairwise(marks)]


def _generate(model: Any, ids: torch.Tensor, cache: Any, steps: int) -> list[float]:
    """Seconds between tokens in `generate`, which goes on after the last of `ids`; the first is left out."""
    if not steps:
        return []
    came = _Came()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=[came],
    )
    return [later - earlier for earlier, later in pairwise(came.at_s)]


class _Came(StoppingCriteria):
    """Stops nothing: notes when each token came."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """A token has come."""
        _now_s(input_ids.device)
        self.at_s.append(perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _mark(device: torch.device) -> Any:
    """A moment of the device, or of the host where there is no other."""
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_s(earlier: Any, later: Any) -> float:
    return float(later - earlier if isinstance(later, float) else earlier.elapsed_time(later) * 1e-3)


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _peak_hbm_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()  # what was measured before is not to be counted
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
