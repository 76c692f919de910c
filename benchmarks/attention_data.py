"""Keys and queries that the retrieval benchmarks search: a model's own, and synthetic ones apart from each other."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from runtime.needle import Example, expand, load_evals

ASKED, SINKS, WINDOW = 32, 128, 512
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # runs the model, and builds graphs

Searched = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # keys, queries to build from, queries to ask with


def synthetic(seed: int, keys: int = 16384) -> Searched:
    """Queries out of distribution: keys (1, n, d), queries to build from and to ask with (1, n, d).

    Hidden states x = topic (one of 512, normal) + 0.7 noise, d = 64; keys x Wk + bk and queries x Wq + bq with
    independent random W of spectrum i^-0.5 and independent normal offsets of half the topics' size; half as many
    queries as keys to build from.
    """
    d, topics, random = 64, 512, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    def projection() -> torch.Tensor:
        left, right = torch.linalg.qr(normal(d, d))[0], torch.linalg.qr(normal(d, d))[0]
        return left * torch.arange(1, d + 1) ** -0.5 @ right * d**0.25

    centres, w_k, w_q, b_k, b_q = normal(topics, d), projection(), projection(), normal(d) / 2, normal(d) / 2

    def hidden(rows: int) -> torch.Tensor:
        return centres[torch.randint(topics, (rows,), generator=random)] + 0.7 * normal(rows, d)

    found, build, asked = hidden(keys) @ w_k + b_k, hidden(keys // 2) @ w_q + b_q, hidden(ASKED) @ w_q + b_q
    return found[None], build[None], asked[None]


def examples(context: int) -> list[Example]:
    """The niah_multiquery examples of that length, from the middle of the depths on."""
    found = [example for example in load_evals(("niah_multiquery",)) if example.length_tokens == context]
    middle = next(number for number, example in enumerate(found) if example.depth >= 0.45)
    return found[middle:] + found[:middle]


def needle(example: Example, layers: Sequence[int]) -> list[Searched]:
    """What each of `layers` of needle-28m searches on one prompt and its answer: `attended`, asked by 32 queries."""
    with TemporaryDirectory() as folder:
        # On a GPU attention in fp32 would hold all scores at once.
        dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(expand(Path(folder)), dtype=dtype).to(DEVICE)
    tokens = torch.from_numpy(np.concatenate([example.prompt, example.answer]))
    return attended(model, tokens, layers, asked=ASKED, end=len(example.prompt) - WINDOW)


@torch.no_grad()
def attended(
    model: PreTrainedModel, tokens: torch.Tensor, layers: Sequence[int], *, asked: int, end: int | None = None
) -> list[Searched]:
    """What each of `layers` of a model of Llama's form searches in `tokens` (n,).

    Keys (kv_heads, n, d): the tokens up to `end`, without 128 sinks; queries to build from (heads, n, d): those of the
    same tokens; asked (heads, asked, d): those of the last tokens. `end` leaves out the last 512, if not given. All
    are rotated, and rounded to 16 bits, as a cache holds them.
    """
    kept: dict[int, Searched] = {}
    end = len(tokens) - WINDOW if end is None else end

    def keep(number: int, layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        normed, attention = layer.input_layernorm(arguments[0]), layer.self_attn
        shape = (1, normed.shape[1], -1, attention.head_dim)
        q, k = (project(normed).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
        angles = model.model.rotary_emb(normed, torch.arange(normed.shape[1], device=model.device)[None])
        q, k = (x[0].half().float().cpu() for x in apply_rotary_pos_emb(q, k, *angles))
        kept[number] = (k[:, SINKS:end].contiguous(), q[:, SINKS:end], q[:, -asked:])

    for number in layers:
        model.model.layers[number].register_forward_pre_hook(lambda layer, given, n=number: keep(n, layer, given))
    model.model(tokens[None].to(model.device), use_cache=False)
    return [kept[number] for number in layers]
