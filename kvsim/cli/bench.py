"""`kvsim bench`: time the runtime on the machine at hand, beside what the simulator says of it."""

import json as jsonlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from kvsim.cli.destination import check_takes_a_file
from kvsim.cli.extras import require_runtime
from kvsim.cli.output import Columns, JsonFlag, json_text, print_json, print_line, print_table
from kvsim.cli.progress import progress_bar
from kvsim.models import load_model, model_names
from kvsim.text.names import unknown_name
from kvsim.text.units import format_bytes, format_rate, parse_tokens
from kvsim.version import __version__
from policies import Policy, parse_policy
from policies.shown import shown

if TYPE_CHECKING:
    from kvsim.explain.predicted import Predictor
    from runtime.bench.decode import Timed

app = typer.Typer(no_args_is_help=True, add_completion=False)

SHIPPED = "needle-28m"  # comes with its weights
SETTLING = 8  # tokens of a context that are decoded and not timed
BASELINES = ("hf-dynamic", "hf-static", "hf-offloaded")
COLUMNS: Columns = {
    "cache": "left",
    "prompt": "right",
    "batch": "right",
    "TTFT": "right",
    "predicted": "right",
    "TPOT": "right",
    "predicted ": "right",
    "floor": "right",
    "in generate": "right",
    "HBM peak": "right",
    "moved a token": "right",
    "counts": "left",
    "steps": "left",
}


class _Case(NamedTuple):
    way: str
    prompt_tokens: int
    batch: int


@app.callback()
def bench() -> None:
    """Time the runtime on the machine at hand, beside what the simulator says of it."""


@app.command()
def decode(
    model: Annotated[
        str,
        typer.Option(metavar="NAME|DIR", help="A shape of the catalogue, with random weights, or a model's folder."),
    ] = "llama-3.1-8b",
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="POLICY", help="name or name:key=value,...; repeat it. Default: full and shadowkv."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(metavar="CACHE", help=f"A cache of Transformers beside them: {', '.join(BASELINES)}; repeat it."),
    ] = None,
    context: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens when decoding ends: 8k,32k.")] = "8k",
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="Sequences that decode together.")] = "1",
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Decode steps that are timed.")] = 32,
    generate_steps: Annotated[
        int, typer.Option(metavar="N", min=0, help="Further steps, timed inside `generate`.")
    ] = 0,
    capture: Annotated[
        bool, typer.Option("--capture/--no-capture", help="Capture decode steps as a CUDA graph where that can be.")
    ] = True,
    prefill_chunk: Annotated[
        str | None, typer.Option(metavar="N", help="Process prompts N tokens at a time. Default: at once.")
    ] = None,
    token_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Feed a random token for N steps, then another, and so on, so that queries are alike and caches are "
            "hit. Default: the likeliest token, a new one at each step.",
        ),
    ] = None,
    gpu: Annotated[
        str, typer.Option(metavar="GPU", help="The GPU that is predicted. Default: this one's measured set.")
    ] = "",
    host: Annotated[str, typer.Option(metavar="HOST", help="The host that is predicted. Default: the GPU's.")] = "",
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Default: a GPU where there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Default: bf16, or as a folder's is stored.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON there too.")] = None,
    json: JsonFlag = False,
) -> None:
    """Time first tokens and decode steps under policies, beside the simulator's prediction at the counts that occurred.

    Prompts are random tokens. A policy whose steps cannot be captured runs them one kernel at a time, and the row says
    why. `floor` is the prediction at the datasheet's rates, with nothing lost to launches.
    """
    asked = policy or ["full", "shadowkv"]
    ways = [*asked, *(baseline or ())]
    cases = _cases(ways, _counts("context", context), _counts("batch", batch), steps + generate_steps)
    chunk_tokens = None if prefill_chunk is None else _counts("prefill-chunk", prefill_chunk)[0]
    parsed = {text: parse_policy(text) for text in asked}
    for name in baseline or ():
        if name not in BASELINES:
            raise unknown_name("cache", name, BASELINES)
    if out is not None:
        check_takes_a_file("--out", out)
    require_runtime()
    from kvsim.explain.predicted import Predictor
    from runtime.bench.decode import machine

    loaded = _loaded(model, device, dtype)
    about = machine(loaded)
    shape = load_model(model if model in model_names() else str(Path(model) / "config.json"))
    predictor = Predictor(shape, gpu, host, about["device"])
    options = {
        "generate_steps": generate_steps,
        "capture": capture,
        "chunk_tokens": chunk_tokens,
        "token_every": token_every,
    }
    rows = []
    with progress_bar("cases", len(cases)) as show:
        for case in cases:
            timed = _timed(loaded, case, parsed.get(case.way), steps, options)
            rows.append(_row(case, timed, predictor, parsed.get(case.way)))
            show(len(rows))
    document = {
        "kind": "bench-decode",
        "kvsim": __version__,
        "model": model,
        **about,
        "prediction": predictor.note,
        "steps": steps,
        **options,
        "rows": rows,
    }
    if out is not None:
        out.write_text(json_text(document) + "\n", encoding="utf-8")
    if json:
        print_json(document)
        return
    print_table(COLUMNS, (tuple(_cells(row)) for row in rows))
    for why in dict.fromkeys(why for row in rows for why in row.get("eager", {})):
        print_line(f"not captured: {why}")
    print_line(predictor.note)


@app.command()
def kernels(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON there too.")] = None,
    json: JsonFlag = False,
) -> None:
    """Time the kernels of a decode step on this GPU, at the shapes of Llama-3.1-8B, beside PyTorch's for the same."""
    if out is not None:
        check_takes_a_file("--out", out)
    require_runtime()
    from runtime.bench.kernels import time_kernels
    from runtime.calibration.device import device

    timed = [asdict(one) for one in time_kernels()]
    document = {"kind": "bench-kernels", "kvsim": __version__, **device()._asdict(), "rows": timed}
    if out is not None:
        out.write_text(json_text(document) + "\n", encoding="utf-8")
    if json:
        print_json(document)
        return
    columns: Columns = {"kernel": "left", "shape": "left", "time": "right", "of bytes": "right", "PyTorch": "right"}
    print_table(columns, (_kernel_cells(row) for row in timed))


def _kernel_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    rate = format_rate(row["nbytes"] / row["seconds"], "B/s")
    other = "" if row["torch_s"] is None else f"{row['torch_s'] * 1e6:.1f} us"
    return row["kernel"], row["shape"], f"{row['seconds'] * 1e6:.1f} us", f"{rate} over {row['link']}", other


def _cases(ways: list[str], contexts: list[int], batches: list[int], decoded: int) -> list[_Case]:
    from_end = decoded + SETTLING
    for tokens in contexts:
        if tokens <= from_end:
            raise ValueError(f"--context {tokens} leaves no prompt before {from_end} tokens that are decoded; use more")
    return [_Case(way, tokens - from_end, batch) for tokens in contexts for batch in batches for way in ways]


def _counts(name: str, text: str) -> list[int]:
    numbers = [parse_tokens(part) for part in text.split(",")]
    if any(number < 1 for number in numbers):
        raise ValueError(f"--{name} {shown(text)} must name numbers of at least 1")
    return numbers


def _loaded(model: str, device: str | None, dtype: str | None) -> Any:
    if model in model_names() and model != SHIPPED:
        from runtime.bench.models import random_model

        text = (files("kvsim") / "catalogue" / "models" / f"{model}.json").read_text("utf-8")
        return random_model(model, jsonlib.loads(text), device, dtype)
    from runtime.loading import load_model as load_trained
    from runtime.loading import model_folder

    with model_folder(model) as folder:
        return load_trained(folder, device, dtype)


def _timed(model: Any, case: _Case, policy: Policy | None, steps: int, options: Mapping[str, Any]) -> "Timed | str":
    """What was measured, or why it was not."""
    from runtime.bench.decode import time_cache, time_policy

    try:
        if policy is None:
            return time_cache(model, case.way, prompt_tokens=case.prompt_tokens, batch=case.batch, steps=steps)
        sizes: dict[str, Any] = {"prompt_tokens": case.prompt_tokens, "batch": case.batch, "steps": steps}
        return time_policy(model, policy, way=case.way, **sizes, **options)
    except MemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}"


def _row(case: _Case, timed: "Timed | str", predictor: "Predictor", policy: Policy | None) -> dict[str, Any]:
    about = {"cache": case.way, "prompt_tokens": case.prompt_tokens, "batch": case.batch}
    if isinstance(timed, str):
        return {**about, "failed": timed}
    predicted = predictor.of(policy, case.prompt_tokens, case.prompt_tokens + SETTLING, case.batch, timed.counts)
    row = {
        **about,
        "ttft_s": timed.ttft_s,
        "tpot_s": timed.mean_s,
        "tpot_median_s": timed.median_s,
        "tpot_each_s": timed.tpot_s,
        "generate_tpot_s": median(timed.generate_tpot_s) if timed.generate_tpot_s else None,
        **predicted,
        "held_bytes": {str(tier): nbytes for tier, nbytes in timed.held_bytes.items()},
        "moved_bytes_per_token": {
            f"{src}->{dst}": nbytes / timed.steps for (src, dst), nbytes in timed.moved_bytes.items()
        },
        "peak_hbm_bytes": timed.peak_hbm_bytes,
        "counts": timed.counts,
        "replayed_steps": timed.replayed,
        "eager": timed.eager,
    }
    for name in ("ttft", "tpot"):
        if f"predicted_{name}_s" in predicted and row[f"{name}_s"]:
            row[f"{name}_error"] = predicted[f"predicted_{name}_s"] / row[f"{name}_s"] - 1
    return row


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield from (row["cache"], f"{row['prompt_tokens']:,}", str(row["batch"]))
    if "failed" in row:
        yield from (row["failed"], *[""] * (len(COLUMNS) - 4))
        return
    yield "filled" if row["ttft_s"] is None else f"{row['ttft_s']:.3g} s"
    yield _predicted(row, "ttft")
    yield _ms(row["tpot_s"])
    yield _predicted(row, "tpot")
    yield _ms(row.get("floor_tpot_s"))
    yield _ms(row["generate_tpot_s"])
    yield format_bytes(row["peak_hbm_bytes"]) if row["peak_hbm_bytes"] else ""
    yield ", ".join(f"{link} {format_bytes(round(n))}" for link, n in row["moved_bytes_per_token"].items() if n)
    yield ", ".join(f"{name} {share:.0%}" for name, share in row["counts"].items())
    yield "one graph" if row["replayed_steps"] else "kernel by kernel"


def _predicted(row: dict[str, Any], name: str) -> str:
    seconds = row.get(f"predicted_{name}_s")
    if seconds is None:
        return ""
    shown_s = f"{seconds:.3g} s" if name == "ttft" else _ms(seconds)
    error = row.get(f"{name}_error")
    return shown_s if error is None else f"{shown_s} ({error:+.0%})"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f} ms"
