"""`kvsim generate`: run a model under a policy, and see what its cache cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.destination import check_takes_a_file
from kvsim.cli.extras import require_runtime
from kvsim.cli.output import JsonFlag, print_facts, print_json
from kvsim.cli.progress import progress_bar
from kvsim.text.documents import read_document
from kvsim.text.printable import printable
from kvsim.text.units import format_bytes, format_s, parse_tokens

if TYPE_CHECKING:
    from policies import Policy
    from traces.counts import Recording


def generate(
    prompt_file: Annotated[Path, typer.Option(metavar="FILE", help="Text to go on from, UTF-8.")],
    model: Annotated[
        str, typer.Option(metavar="DIR", help="A folder with a model, or the one that is shipped.")
    ] = "needle-28m",
    policy: Annotated[str, typer.Option(metavar="POLICY", help="name or name:key=value,...")] = "full",
    max_new_tokens: Annotated[str, typer.Option(metavar="N", help="Tokens to generate, at the most.")] = "128",
    prefill_chunk: Annotated[
        str | None, typer.Option(metavar="N", help="Process the prompt N tokens at a time. Default: at once.")
    ] = None,
    counts_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Record what data decided, for --counts of other commands.")
    ] = None,
    capture: Annotated[
        bool, typer.Option("--capture", help="Capture decode steps as one CUDA graph, where policy and model let it.")
    ] = False,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Default: a GPU where there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Default: fp32 on a CPU, as stored on a GPU.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Continue a text greedily under a policy; then print its latency, its memory, and the bytes that it moved."""
    new_tokens = _positive("max-new-tokens", max_new_tokens)
    chunk_tokens = None if prefill_chunk is None else _positive("prefill-chunk", prefill_chunk)
    prompt = read_document(prompt_file)
    if counts_out is not None:
        check_takes_a_file("--counts-out", counts_out)
    require_runtime()
    from policies import parse_policy
    from runtime import offload
    from runtime.generation import encode, generate_text
    from runtime.loading import load_model, load_tokenizer, model_folder

    parsed = parse_policy(policy)
    with model_folder(model) as folder:
        tokenizer = load_tokenizer(folder)
        loaded = load_model(folder, device, dtype)
    ids = encode(tokenizer, prompt)
    with offload(loaded, parsed, max_new_tokens=new_tokens, capture=capture) as kv:
        with progress_bar("prompt and index", ids.shape[1]) as show_progress:
            made = generate_text(
                kv,
                tokenizer,
                ids,
                prefill_chunk_tokens=chunk_tokens,
                show=(lambda _text: None) if json else _show,
                progress=show_progress,
            )
        recording = kv.counts
        report = {
            "model": model,
            "policy": policy,
            "device": str(loaded.device),
            "dtype": kv.shape.dtype,
            "prompt_tokens": ids.shape[1],
            "output_tokens": len(made.tokens),
            "ttft_s": made.ttft_s,
            "tpot_s": made.tpot_s,
            "held_bytes": {str(tier): nbytes for tier, nbytes in made.held_bytes.items()},
            "moved_bytes": {"->".join(link): nbytes for link, nbytes in kv.moved_bytes.items()},
            "counts": recording.shares(),
            "union_factor": _union_factor(parsed, recording),
            "replayed_steps": kv.replays.replayed,
            "eager_steps": dict(kv.replays.eager),
        }
    try:
        if counts_out is not None:
            recording.save(counts_out)
    finally:  # what was generated is shown, whether or not the recording could be written
        if json:
            print_json({**report, "text": made.text, "tokens": made.tokens})
        else:
            typer.echo("\n")
            print_facts(f"{policy}: {model} in {report['dtype']} on {report['device']}", _facts(report))


def _union_factor(policy: "Policy", recording: "Recording") -> float | None:
    """Pages that a group of query heads reads together, as a multiple of those that one of its heads chooses.

    `None` where heads do not choose on their own, or nothing was chosen.
    """
    from policies import Quest

    added = recording.counts.get("added")
    if not isinstance(policy, Quest) or added is None:
        return None
    could = added.maximum > 0  # rows are as wide as the layer with the most KV heads
    return 1 + float(added.value[could].mean()) / policy.chosen_pages


def _facts(report: dict[str, Any]) -> dict[str, str]:
    facts = {
        "prompt": f"{report['prompt_tokens']:,} tokens",
        "output": f"{report['output_tokens']:,} tokens",
        "TTFT": format_s(report["ttft_s"]),
        "TPOT p50": "-" if report["tpot_s"] is None else format_s(report["tpot_s"]),
    }
    facts |= {f"held in {tier}": _sized(nbytes) for tier, nbytes in report["held_bytes"].items()}
    facts |= {f"moved {link}": _sized(nbytes) for link, nbytes in report["moved_bytes"].items()}
    for name, share in report["counts"].items():
        hits = f", so {1 - share:.1%} hits" if name.rpartition(".")[2] == "miss" else ""
        facts[name] = f"{share:.1%} of its maximum{hits}"
    if report["union_factor"] is not None:
        facts["read by a group"] = f"{report['union_factor']:.2f} times the pages that one head chooses"
    if report["replayed_steps"]:
        facts["replayed"] = f"{report['replayed_steps']:,} steps, as one CUDA graph"
    facts |= {f"{steps:,} not captured": why for why, steps in report["eager_steps"].items()}
    return facts


def _sized(nbytes: int) -> str:
    return f"{format_bytes(nbytes)} ({nbytes:,} B)"


def _show(text: str) -> None:
    typer.echo(printable(text, layout=True), nl=False)


def _positive(name: str, text: str) -> int:
    number = parse_tokens(text)
    if number < 1:
        raise ValueError(f"--{name} {text} must be at least 1")
    return number
