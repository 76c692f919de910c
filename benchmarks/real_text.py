"""What policies lose on real text: SmolLM2-135M-Instruct's predictions under each against full attention.

    scripts/fetch_real out/real                                  the model and three texts
    python benchmarks/real_text.py out/real [--device cuda] [--contexts 2048 4096 6144 8128] [--ways NAME ...]

Each figure is a mean over places in prose, technical text and code, 64 tokens predicted at each. Budgets are shares of
the context. Rows are merged into the file as they are measured, each with the machine, date and commit that it is of;
`benchmarks/quality.py --page` writes them down.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from policies import parse_policy  # noqa: E402
from runtime.loading import load_model, load_tokenizer  # noqa: E402
from runtime.methods import retrieval_attention  # noqa: E402
from runtime.quality import Passages, full_logits, measure, passages  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "real_text.json"
TEXTS = ("prose", "technical", "code")
CONTEXTS = (2048, 4096, 6144, 8128)
NEW, PLACES = 64, 4  # tokens predicted at each place, places in each text
WAYS = {  # what each row is called, and its policy for a context of n tokens: n_16 is a sixteenth of it
    "offload-all": "offload-all",
    "sink-window 1/16": "sink-window:window_tokens={n_16}",
    "sink-window 1/8": "sink-window:window_tokens={n_8}",
    "sink-window 1/4": "sink-window:window_tokens={n_4}",
    "snapkv 1/16": "snapkv:budget_tokens={n_16}",
    "snapkv 1/8": "snapkv:budget_tokens={n_8}",
    "snapkv 1/4": "snapkv:budget_tokens={n_4}",
    "quest 1/16": "quest:budget_tokens={n_16}",
    "quest 1/8": "quest:budget_tokens={n_8}",
    "quest 1/4": "quest:budget_tokens={n_4}",
    "quest 1/8, each query head": "quest:budget_tokens={n_8},per=query_head",
    "quest 2/11, as many bytes as that": "quest:budget_tokens={two_n_11}",
    "quest 1/8, no sinks": "quest:budget_tokens={n_8},sink_tokens=0",
    "infllm 1/16": "infllm:sink_tokens=16,window_tokens={n_32},block_tokens=32,top_k={n_1024},cache_blocks={n_512}",
    "infllm 1/8": "infllm:sink_tokens=16,window_tokens={n_16},block_tokens=32,top_k={n_512},cache_blocks={n_256}",
    "infllm 1/4": "infllm:sink_tokens=16,window_tokens={n_8},block_tokens=32,top_k={n_256},cache_blocks={n_128}",
    "infllm, default": "infllm",
    "squeezed-attention keep=0.05": "squeezed-attention:keep=0.05",
    "squeezed-attention keep=0.1": "squeezed-attention",
    "squeezed-attention keep=0.2": "squeezed-attention:keep=0.2",
    "squeezed-attention keep=0.1, mean of a group": "squeezed-attention:group_score=mean",
    "squeezed-attention keep=0.1, no sinks": "squeezed-attention:sink_tokens=0",
    "squeezed-attention 1/10, DDR": "squeezed-attention:budget_tokens={n_10},tier=ddr",
    "shadowkv 1/16": "shadowkv:budget_tokens={n_16}",
    "shadowkv 1/8": "shadowkv:budget_tokens={n_8}",
    "shadowkv 1/4": "shadowkv:budget_tokens={n_4}",
    "shadowkv 1/8, no sinks, no outliers": "shadowkv:budget_tokens={n_8},sink_tokens=0,outlier_chunks=0",
    "retrieval-attention flat, top 100": "retrieval-attention:index=flat",
    "retrieval-attention graph": "retrieval-attention",
    "retrieval-attention graph, only 2 % scanned": "retrieval-attention:scan_factor=1",
    "retrieval-attention graph, 10 for each found": "retrieval-attention:scan_factor=10",
    "retrieval-attention graph, 20 for each found": "retrieval-attention:scan_factor=20",
    "retroinfer": "retroinfer",
    "retroinfer 1/8": "retroinfer:retrieval=0.125",
    "retroinfer, nothing estimated": "retroinfer:estimation=0",
    "retroinfer, no sinks": "retroinfer:sink_tokens=0",
}


def policy_text(way: str, tokens: int) -> str:
    """A row's policy for a context of `tokens`; budgets are whole pages and chunks."""
    shares = {f"n_{k}": max(1, tokens // k // 16 * 16 if k < 32 else tokens // k) for k in _SHARES}
    return WAYS[way].format(**shares, two_n_11=2 * tokens // 11 // 16 * 16)


_SHARES = (4, 8, 10, 16, 32, 128, 256, 512, 1024)


@contextmanager
def graphs_built_once() -> Iterator[None]:
    """While it lasts, a graph that was built of the same keys and queries is taken again: rows differ in the search."""
    built: dict[Any, Any] = {}
    link = retrieval_attention.link

    def once(keys: torch.Tensor, queries: torch.Tensor, parameters: Any) -> Any:
        made_by = replace(parameters, scanned=1.0, scan_factor=1, stop_gain=0.0)
        of = *(float(tensor.double().sum()) for tensor in (keys, queries)), tuple(keys.shape), made_by
        if of not in built:
            built[of] = link(keys, queries, parameters)
        return built[of]

    retrieval_attention.link = once
    try:
        yield
    finally:
        retrieval_attention.link = link


def side_by_side(tokenizer: Any, folder: Path, context: int) -> Passages:
    """The passages of all texts as one batch, four places in each text."""
    cut = [passages(tokenizer, (folder / f"{name}.txt").read_text(), context, NEW, PLACES) for name in TEXTS]
    return Passages(ids=torch.cat([each.ids for each in cut]), context_tokens=context, new_tokens=NEW)


def row_of(way: str, context: int, model: Any, asked: Passages, full: torch.Tensor) -> dict[str, Any]:
    """Measure one cell."""
    text, began = policy_text(way, context), time.perf_counter()
    found = measure(model, parse_policy(text), asked, full)
    return {
        "way": way,
        "policy": text,
        "context_tokens": context,
        **{
            name: {text: of[PLACES * i : PLACES * (i + 1)] for i, text in enumerate(TEXTS)}
            for name, of in (("kl_nats", found.kl_nats), ("nll_nats", found.nll_nats), ("top1_share", found.top1_share))
        },
        "held_bytes": {str(tier): nbytes for tier, nbytes in found.held_bytes.items()},
        "moved_bytes_per_token": found.moved_bytes_per_token,
        "counts": found.recording.shares(),
        "seconds": time.perf_counter() - began,
    }


def _git() -> str:
    run = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip() or "unknown"


def main() -> None:
    """Measure and merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), metavar="NAME", help="beginnings of table rows")
    parser.add_argument("--commit", default=None, help="where there is no git")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.folder / "model")
    model = load_model(arguments.folder / "model", arguments.device, "fp32")
    measured = {
        "schema_version": 2,
        "model": "SmolLM2-135M-Instruct",
        "texts": {n: hashlib.sha256((arguments.folder / f"{n}.txt").read_bytes()).hexdigest() for n in TEXTS},
        "dtype": str(model.dtype).removeprefix("torch."),
        "new_tokens": NEW,
        "places": PLACES,
    }
    run = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": arguments.commit or _git(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    report = {**_before(arguments.out, measured), **measured}
    rows = report.pop("rows", [])
    for context in arguments.contexts:
        asked = side_by_side(tokenizer, arguments.folder, context)
        full = full_logits(model, asked)
        ways = [way for way in WAYS if any(way.startswith(name) for name in arguments.ways)]
        with graphs_built_once():
            for row in ({**row_of(way, context, model, asked, full), **run} for way in ways):
                rows = [old for old in rows if _cell(old) != _cell(row)] + [row]
                rows.sort(key=lambda r: (list(WAYS).index(r["way"]), r["context_tokens"]))
                arguments.out.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")
                kl = {text: sum(of) / len(of) for text, of in row["kl_nats"].items()}
                shown = " ".join(f"{text} {value:.4f}" for text, value in kl.items())
                sys.stdout.write(f"{row['way']:44s} {context:5d} KL {shown} {row['seconds']:6.1f} s\n")
                sys.stdout.flush()


def _before(path: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """What was measured already: of the same model and texts, or nothing can be added to it."""
    old: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if other := [name for name, value in measured.items() if old and old[name] != value]:
        raise SystemExit(f"{path} holds rows of another {' and '.join(other)}; give another --out")
    return old


def _cell(row: dict[str, Any]) -> tuple[str, int]:
    return row["way"], row["context_tokens"]


if __name__ == "__main__":
    main()
