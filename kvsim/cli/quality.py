"""`kvsim quality`: what policies change in a model's predictions on a text, beside what they keep and move."""

import math
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.destination import check_takes_a_file
from kvsim.cli.extras import require_runtime
from kvsim.cli.output import SCHEMA_VERSION, JsonFlag, print_json, print_line, print_table
from kvsim.cli.progress import progress_bar
from kvsim.text.documents import read_document
from kvsim.text.units import parse_tokens
from kvsim.version import __version__
from policies.shown import shown

if TYPE_CHECKING:
    from policies import Policy
    from runtime.quality import Passages, Quality
    from traces.counts import Recording


def quality(
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text of the kind that the model will read, UTF-8.")],
    policy: Annotated[
        list[str], typer.Option(metavar="POLICY", help="name or name:key=value,...; repeat it for several.")
    ],
    model: Annotated[
        str, typer.Option(metavar="DIR", help="A folder with a model, or the one that is shipped.")
    ] = "needle-28m",
    context: Annotated[str, typer.Option(metavar="N,...", help="Tokens of context: 2k,4k,8k.")] = "2k,4k",
    new: Annotated[str, typer.Option(metavar="N", help="Tokens to predict after each context.")] = "128",
    places: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Places in the text to try.")] = 4,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON, for comparisons and plans.")
    ] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page (HTML) of the figures.")] = None,
    counts_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Record what data decided at the longest context, for --counts; one policy."),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Default: a GPU where there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Default: fp32 on a CPU, as stored on a GPU.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Feed a text to a model with full attention and under policies, and compare what it predicts: the quality lost.

    KL is the divergence of the predictions in nats a token (0: none), NLL by how much the text itself is less likely,
    same top-1 how often the likeliest token is the same. Intervals are 95 %, over the places in the text.
    """
    contexts = sorted({_positive("context", part) for part in context.split(",")})
    new_tokens = _positive("new", new)
    if counts_out is not None and len(policy) > 1:
        raise ValueError(f"--counts-out takes the counts of one policy, and {len(policy)} are given; run them apart")
    content = read_document(text)
    require_runtime()
    from kvsim.report.quality import TABLE, caption, cells, quality_page
    from policies import parse_policy
    from runtime.loading import load_model, load_tokenizer, model_folder
    from runtime.quality import passages

    for option, path in {"--save": save, "--page": page, "--counts-out": counts_out}.items():
        if path is not None:
            check_takes_a_file(option, path)
    parsed = {given: parse_policy(given) for given in policy}  # a wrong one is named before a model is loaded
    with model_folder(model) as folder:
        tokenizer = load_tokenizer(folder)
        asked = [passages(tokenizer, content, tokens, new_tokens, places) for tokens in contexts]
        loaded = load_model(folder, device, dtype)
    rows, recording = _measured(loaded, parsed, asked)
    document = {
        "schema_version": SCHEMA_VERSION,
        "kind": "quality",
        "kvsim": __version__,
        "model": model,
        "text": {"name": text.name, "sha256": sha256(content.encode()).hexdigest()},
        "new_tokens": new_tokens,
        "places": places,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "rows": rows,
    }
    if save:
        _put(save, dumps(document, indent=1, allow_nan=False) + "\n")
    if page:
        _put(page, quality_page(document))
    if counts_out:
        recording.save(counts_out)
    if json:
        print_json(document)
    else:
        print_table(TABLE, (cells(row) for row in rows))
        print_line(caption(document))


def _measured(
    model: Any, policies: "dict[str, Policy]", asked: "list[Passages]"
) -> "tuple[list[dict[str, Any]], Recording]":
    """A row for each context and policy, and the recording of the last."""
    from runtime.quality import full_logits, measure

    rows = []
    with progress_bar("tokens", len(policies) * sum(each.ids.shape[1] for each in asked)) as show:
        before = 0
        for each in asked:
            full = full_logits(model, each)
            for text, policy in policies.items():
                found = measure(model, policy, each, full, partial(_further, show, before))
                before += each.ids.shape[1]
                rows.append(_row(text, each.context_tokens, found))
    return rows, found.recording


def _further(show: Callable[[int], None], before: int, done: int) -> None:
    show(before + done)


def _row(policy: str, context_tokens: int, found: "Quality") -> dict[str, Any]:
    from kvsim.report.quality import FIGURES, LIMITS

    return {
        "policy": policy,
        "context_tokens": context_tokens,
        **{name: _interval(getattr(found, name), *LIMITS.get(name, ())) for name in FIGURES},
        "held_bytes": {str(tier): nbytes for tier, nbytes in found.held_bytes.items()},
        "moved_bytes_per_token": found.moved_bytes_per_token,
        "counts": found.recording.shares(),
    }


def _interval(values: list[float], least: float = -math.inf, most: float = math.inf) -> dict[str, Any]:
    """Mean and 95 % interval over the places, within what the figure can be; of a single place there is none."""
    from kvsim.results.intervals import t_interval

    if len(values) == 1:
        return {"mean": values[0], "low": None, "high": None, "places": values}
    mean, low, high = t_interval(values)
    return {"mean": mean, "low": max(low, min(least, mean)), "high": min(high, most), "places": values}


def _put(path: Path, content: str) -> None:
    from traces.replacing import replacing

    with replacing(path) as stream:
        stream.write(content.encode("utf-8", "backslashreplace"))


def _positive(name: str, text: str) -> int:
    number = parse_tokens(text)
    if number < 1:
        raise ValueError(f"--{name} {shown(text)} must be at least 1")
    return number
