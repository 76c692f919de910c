"""Whether a model under a policy gives the tokens and logits that it gives by itself."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from policies import parse_policy
from runtime import offload

PROMPT, NEW = 37, 5  # tokens
PADS = (2, 5, 19)  # on the left of three prompts in a batch
LOGITS = 1e-4  # of the largest logit: some hundred roundings of fp32

# Each executed policy in a form that leaves nothing out of a prompt of 37 tokens. ShadowKV's seven chunks are all that
# is real of eight only where there is padding.
EXACT = {
    "full": "full",
    "offload-all": "offload-all",
    "sink-window": "sink-window",
    "snapkv": "snapkv:budget_tokens=37,observation_tokens=8",
    "quest": "quest:page_tokens=1,budget_tokens=64,dense_layers=0",
    "infllm": "infllm:window_tokens=57,block_tokens=4,execution_tokens=8",
    "squeezed-attention": "squeezed-attention:keep=1,observation_tokens=4,centroid_share=0.2",
    "shadowkv": "shadowkv:chunk_tokens=2,budget_tokens=14,rank=36,outlier_chunks=0",
    "retrieval-attention": "retrieval-attention:sink_tokens=2,window_tokens=8,top_k=27,index=flat",
    "retroinfer": "retroinfer:window_tokens=4,cluster_tokens=4,update_tokens=8,retrieval=1,estimation=0",
}
PADDED_ALONE = ("shadowkv",)
# Forms that leave something out, or the default: they must run, whatever comes out.
LOSSY = (
    *EXACT,
    "sink-window:sink_tokens=2,window_tokens=9",
    "snapkv:budget_tokens=20,observation_tokens=8",
    "quest:page_tokens=4,budget_tokens=16,dense_layers=0",
    "infllm:sink_tokens=2,window_tokens=10,block_tokens=4,top_k=2,cache_blocks=4",
    "squeezed-attention:keep=0.5,observation_tokens=4,centroid_share=0.2,tier=ddr",
    "shadowkv:chunk_tokens=2,budget_tokens=6",
    "retrieval-attention:sink_tokens=2,window_tokens=8,top_k=5,index=flat",
    "retroinfer:window_tokens=4,cluster_tokens=2,update_tokens=4,retrieval=0.2,estimation=0.4",
)


@dataclass(slots=True)
class Verdict:
    """What became of each policy: exact, refused (and why), or wrong (and how); `ran` counts the lossy forms."""

    exact: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    ran: int = 0


def prompts(batch: int, vocabulary: int = 101) -> dict[str, torch.Tensor]:
    """Ids and mask of one prompt, or of three that are padded on the left."""
    ids = torch.randint(3, vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, pad in zip(range(batch), PADS if batch > 1 else (0,), strict=True):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, batch: int, cache: Any = None, new: int = NEW) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens (batch, PROMPT + new), and the logits that chose them (batch, new, vocabulary)."""
    options = {} if cache is None else {"past_key_values": cache}
    out = model.generate(
        **prompts(batch),
        **options,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


def judge(model: Any, policies: Iterable[str] = EXACT, lossy: Iterable[str] = LOSSY) -> Verdict:
    """Try each policy in its exact form on one prompt and on three padded ones, and whether the lossy forms run."""
    stock = {batch: generated(model, batch) for batch in (1, 3)}
    verdict = Verdict()
    for name in policies:
        for batch in (3,) if name in PADDED_ALONE else (1, 3):
            try:
                with offload(model, parse_policy(EXACT[name]), max_new_tokens=NEW) as kv:
                    tokens, logits = generated(model, batch, kv.cache())
            except ValueError as error:
                verdict.refused[name] = str(error)
                break
            except Exception as error:  # noqa: BLE001 - a crash is a verdict too, and the other policies get theirs
                verdict.wrong[name] = f"{type(error).__name__}: {error}"
                break
            if why := _differs(tokens, logits, *stock[batch]):
                verdict.wrong[name] = f"{why}, batch of {batch}"
                break
        else:
            verdict.exact.append(name)
    for text in lossy:
        name = text.partition(":")[0]
        if name in verdict.exact:
            with offload(model, parse_policy(text), max_new_tokens=NEW) as kv:
                if bool(generated(model, 3, kv.cache(), new=2)[1].isfinite().all()):
                    verdict.ran += 1
                else:
                    verdict.wrong[text] = "logits that are no numbers"
    return verdict


def _differs(tokens: torch.Tensor, logits: torch.Tensor, stock: torch.Tensor, stock_logits: torch.Tensor) -> str:
    if not torch.equal(tokens, stock):
        return "other tokens"
    error = float((logits - stock_logits).abs().max() / stock_logits.abs().max())
    return f"logits off by {error:.1e}" if not error <= LOGITS else ""
