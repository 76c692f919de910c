"""What a policy loses: exact-match accuracy of needle-28m under each policy, beside the memory it keeps and moves.

    python benchmarks/quality.py [--device cuda] [--lengths 8192 16384 32768] [--examples 10] [--policies NAME ...]
    python benchmarks/quality.py --page      writes docs/quality.md from the results, and those of real_text.py

Every cell is the share of examples whose scored tokens greedy decoding produces in place. A policy is judged twice: the
question stands at the end of the prompt (seen), or the cache is built from the context alone and the question follows
as a turn of its own (unseen), as where a cache is reused. Budgets are shares of the context. Each cell is merged into
the file as it is measured: a run that is cut short loses nothing, and policies can be measured one after the other.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from policies import parse_policy  # noqa: E402
from policies.plan import Tier  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.needle import Example, expand, load_evals  # noqa: E402
from traces.counts import COLUMNS  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "quality.json"
REAL_TEXT = ROOT / "benchmarks" / "results" / "real_text.json"
PAGE = ROOT / "docs" / "quality.md"
LENGTHS = (8192, 16384, 32768)
MODES = ("seen", "unseen")
TASKS = ("niah_single", "niah_multikey", "niah_multiquery", "vt", "kv_recall")
WAYS = {  # what each row of the table is called, and its policy for a context of n tokens: n_16 is a sixteenth of it
    "full": "full",
    "offload-all": "offload-all",
    "sink-window 1/8": "sink-window:window_tokens={n_8}",
    "snapkv 1/16": "snapkv:budget_tokens={n_16}",
    "snapkv 1/8": "snapkv:budget_tokens={n_8}",
    # The authors' LongBench settings.
    "snapkv 1/16, max pooling": "snapkv:budget_tokens={n_16},kernel_tokens=7,pooling=max",
    "snapkv 1/8, max pooling": "snapkv:budget_tokens={n_8},kernel_tokens=7,pooling=max",
    "quest 1/16": "quest:budget_tokens={n_16}",
    "quest 1/8": "quest:budget_tokens={n_8}",
    "quest 1/4": "quest:budget_tokens={n_4}",
    "quest 1/8, each query head": "quest:budget_tokens={n_8},per=query_head",
    "quest 2/11": "quest:budget_tokens={two_n_11}",
    "infllm 1/8": "infllm:window_tokens={n_16},top_k={n_2048},cache_blocks={n_1024}",
    "squeezed-attention keep=0.05": "squeezed-attention:keep=0.05",
    "squeezed-attention keep=0.1": "squeezed-attention:keep=0.1",
    "squeezed-attention keep=0.1, 2 levels": "squeezed-attention:keep=0.1,levels=2",
    "squeezed-attention 1/10, DDR": "squeezed-attention:budget_tokens={n_10},tier=ddr",
    # The authors' 24 outlier chunks for each 1,024 tokens of budget, in proportion below, where their code has none.
    "shadowkv 1/64": "shadowkv:budget_tokens={n_64},rank=40,outlier_chunks={o_64}",
    "shadowkv 1/16": "shadowkv:budget_tokens={n_16},rank=40,outlier_chunks={o_16}",
    "shadowkv 1/8": "shadowkv:budget_tokens={n_8},rank=40,outlier_chunks={o_8}",
    "shadowkv 1/4": "shadowkv:budget_tokens={n_4},rank=40,outlier_chunks={o_4}",
    "retrieval-attention flat, top 100": "retrieval-attention:index=flat",
    "retrieval-attention graph": "retrieval-attention",
    "retrieval-attention graph, 3 % scanned": "retrieval-attention:scanned=0.03,scan_factor=1",
    "retrieval-attention graph, 10 % scanned": "retrieval-attention:scanned=0.1,scan_factor=1",
    "retroinfer": "retroinfer",
    "retroinfer, nothing estimated": "retroinfer:estimation=0",
}


def policy_text(way: str, tokens: int) -> str:
    """A row's policy for a context of `tokens`."""
    shares = {f"n_{k}": tokens // k for k in (4, 8, 10, 16, 64, 1024, 2048)}
    outliers = {f"o_{k}": tokens // k * 24 // 1024 for k in (4, 8, 16, 64)}
    return WAYS[way].format(**shares, **outliers, two_n_11=2 * tokens // 11 // 16 * 16)


def groups(tasks: Sequence[str], lengths: Sequence[int], most: int) -> Iterable[list[Example]]:
    """Examples of one task and one length, which run as one batch."""
    found: defaultdict[tuple[str, int], list[Example]] = defaultdict(list)
    for example in load_evals(tasks):
        if example.length_tokens in lengths:
            found[example.task, example.length_tokens].append(example)
    return (group[:most] for group in found.values())


def answers(model: Any, text: str, examples: Sequence[Example], mode: str) -> tuple[list[bool], dict[str, Any]]:
    """Which examples a policy answers, and the bytes of one sequence: kept per tier, moved for each generated token;
    and what the policy's data decided, as shares.
    """
    device, tokens = model.device, max(len(e.prompt) for e in examples)
    ids = torch.zeros(len(examples), tokens, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, -len(example.prompt) :] = torch.from_numpy(example.prompt)
        mask[row, -len(example.prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    new = max(len(e.answer) for e in examples)
    asked = max(e.question_tokens for e in examples)
    with torch.no_grad(), offload(model, parse_policy(text), max_new_tokens=asked + new) as kv:
        cache = kv.cache()
        if mode == "unseen":
            context = {"input_ids": ids[:, :-asked], "attention_mask": mask[:, :-asked]}
            positions = (context["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as `generate` counts them
            model(**context, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
        fed = kv.counts.steps[:, [COLUMNS.index(name) for name in ("sequence", "prompt_tokens", "past_tokens")]]
        decoded = max(1, len({(sequence, past) for sequence, prompt, past in fed.tolist() if past >= prompt}))
        moved = sum(n for (src, dst), n in kv.moved_bytes.items() if {src, dst} == {Tier.HBM, Tier.DDR})
        held, shares = kv.footprint_bytes, kv.counts.shares()
    produced = out[:, tokens:].cpu().numpy()
    right = [example.correct(row) for example, row in zip(examples, produced, strict=True)]
    figures = {
        "hbm_bytes": held[Tier.HBM] / len(examples),
        "ddr_bytes": held[Tier.DDR] / len(examples),
        # Offloading the prompt is part of it: what a user's bus carries, spread over the tokens decoded.
        "moved_bytes_per_token": moved / decoded,
        "counts": shares,
    }
    return right, figures


def measure(model: Any, way: str, mode: str, batches: Iterable[Sequence[Example]]) -> Iterator[dict[str, Any]]:
    """A row for each batch of examples."""
    for examples in batches:
        task, length = examples[0].task, examples[0].length_tokens
        text = policy_text(way, length)
        began = time.perf_counter()
        right, figures = answers(model, text, examples, mode)
        yield {
            "way": way,
            "policy": text,
            "mode": mode,
            "task": task,
            "length_tokens": length,
            "examples": len(examples),
            "right": sum(right),
            "seconds": time.perf_counter() - began,
            **figures,
        }


def merged(old: dict[str, Any], row: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The old report, which says of what run its rows are, with a row of another run in its cell."""
    rows = {_cell(one): one for one in (*old.get("rows", []), {**row, **run})}
    return {"schema_version": 1, **run, **old, "rows": [rows[cell] for cell in sorted(rows)]}


def _cell(row: dict[str, Any]) -> tuple[int, ...]:
    """Where a row stands."""
    place = [list(WAYS).index(row["way"]), MODES.index(row["mode"])]
    return *place, TASKS.index(row["task"]), row["length_tokens"]


def page(report: dict[str, Any], real_text: dict[str, Any]) -> str:
    """The results as a page: real text first, then the model that retrieves."""
    runs = Counter((row["device"], row["date"], row["commit"]) for row in real_text["rows"])
    (usual, _, _), _ = runs.most_common(1)[0]
    introduction = REAL_TEXT_INTRODUCTION.format(
        **real_text,
        device=usual,
        dates=_listed(date for device, date, _ in runs if device == usual),
        commits=_listed(commit for device, _, commit in runs if device == usual),
    )
    return introduction + _real_text_tables(real_text, usual) + _needle_tables(report)


def _listed(words: Iterable[str]) -> str:
    *before, last = sorted(set(words))
    return f"{', '.join(before)} and {last}" if before else last


def _real_text_tables(report: dict[str, Any], usual: str) -> str:
    """A table for each context, longest first; a row of another machine than the `usual` one says so."""
    lines = []
    for context in sorted({row["context_tokens"] for row in report["rows"]}, reverse=True):
        lines += [
            f"\n### {context:,} tokens of context\n\n",
            (
                "| policy | KL prose | KL technical | KL code | NLL | same top-1 "
                "| HBM kept | DDR kept | moved per token |\n"
            ),
            "|---|" + "---:|" * 8 + "\n",
        ]
        for row in (row for row in report["rows"] if row["context_tokens"] == context):
            kl = " | ".join(f"{sum(of) / len(of):.3f}" for of in row["kl_nats"].values())
            nll, top1 = (_mean(row[name]) for name in ("nll_nats", "top1_share"))
            held, way = row["held_bytes"], row["way"]
            if row["device"] != usual:
                way += f" ({row['device']}, {row['date']}, {row['commit']})"
            lines.append(
                f"| {way} | {kl} | {nll:+.3f} | {top1:.0%} | {_mib(held.get('hbm', 0))} | "
                f"{_mib(held.get('ddr', 0))} | {_kib(row['moved_bytes_per_token'])} |\n"
            )
    return "".join(lines)


def _mean(by_text: dict[str, list[float]]) -> float:
    values = [value for of in by_text.values() for value in of]
    return sum(values) / len(values)


def _needle_tables(report: dict[str, Any]) -> str:
    cells: defaultdict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    held: dict[str, dict[str, Any]] = {}
    for row in report["rows"]:
        cell = cells[row["way"], row["mode"], row["task"]]
        cell[0] += row["right"]
        cell[1] += row["examples"]
        if row["mode"] == "seen" and row["length_tokens"] == max(LENGTHS):
            held.setdefault(row["way"], row)
    lines = [INTRODUCTION.format(**report)]
    for mode in MODES:
        title = "The question seen" if mode == "seen" else "The question not seen"
        lines += [
            f"\n### {title}\n\n",
            "| policy | " + " | ".join(TASKS) + " | examples | HBM kept | DDR kept | moved per token |\n",
            "|---|" + "---:|" * (len(TASKS) + 4) + "\n",
        ]
        for way in dict.fromkeys(row["way"] for row in report["rows"]):
            scores = [cells[way, mode, task] for task in TASKS]
            shown = " | ".join(f"{right / of:.2f}" if of else "-" for right, of in scores)
            counts = [of for _, of in scores]
            examples = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
            sizes = "- | - | -"
            if way in held:
                hbm, ddr, moved = (held[way][name] for name in ("hbm_bytes", "ddr_bytes", "moved_bytes_per_token"))
                sizes = f"{_mib(hbm)} | {_mib(ddr)} | {_kib(moved)}"
            lines.append(f"| {way}{_apart(way, report)} | {shown} | {examples} | {sizes} |\n")
    return "".join(lines)


def _apart(way: str, report: dict[str, Any]) -> str:
    """Of a row that is of another run than the report, or of other contexts than the table: which."""
    rows = [row for row in report["rows"] if row["way"] == way]
    lengths = sorted({row["length_tokens"] for row in rows})
    said = [] if set(lengths) == set(LENGTHS) else [", ".join(f"{n // 1024}K" for n in lengths) + " alone"]
    for what in ("device", "dtype", "date", "commit"):
        said += [_listed(found)] if (found := {row[what] for row in rows if what in row}) else []
    return f" ({', '.join(said)})" if said else ""


REAL_TEXT_INTRODUCTION = """\
# What a policy loses

Written by `python benchmarks/quality.py --page`. `kvsim quality` measures the same on a model and a text of your own.

## On real text

{model} ({device}, {dtype}, {dates}, commits {commits}; each row of
`benchmarks/results/real_text.json` names its own): {places} places in each of three texts (a novel, the reference of a
programming language, a module of Python), {new_tokens} tokens predicted at each, fed the text's own words, against what
full attention predicts there. *KL* is the divergence of the prediction in nats a token, *NLL* by how much the text's
words become less likely, *same top-1* how often the likeliest token is the same. Budgets are
shares of the context; *kept* and *moved* (decoding alone) are those of one sequence.

- Models attend to their first tokens for want of anything better. Policies that could drop them damage every text:
  compare the rows without sinks, which are the papers' own forms. All policies keep four of them by default.
- Below a KL of about 0.05 a policy changes one likeliest token in ten or fewer. Of the defaults and the budgets of an
  eighth, at 6,144 tokens RetrievalAttention, ShadowKV and Squeezed Attention stay below it on every text, Quest on
  prose and technical text (0.065 on code); at other lengths Quest needs a quarter, and at 4,096 and 8,128 tokens of the
  technical text more than that: page bounds promise more than a page holds.
- RetrievalAttention's graph predicts as its flat index does, to 0.001, with five keys scanned for each that it returns
  (the default). The 2 % of its paper alone, which measures at 128K, are hardly more than the 100 keys that it returns:
  at 4,096 and 8,128 tokens they lose 0.10 on the technical text.
- ShadowKV stays below 0.05 at a sixteenth from 6,144 tokens on; a rank of 160 is most of this small model's 192
  dimensions of keys, so that it saves less HBM here than elsewhere.
- Squeezed Attention at a tenth of the keys: the exceptions are 2,048 tokens of prose (0.054) and 8,128 of the technical
  text (0.063). Scores of a query group's mean instead of its largest make no difference beyond noise.
- Quest, selecting for each query head (its paper's models have a KV head for each) loses less at the same budget, but
  reads what any head of a group chose: 1.46 times as much here. With as many bytes, at 2/11 of the context, selecting
  for each KV head loses less at 2,048 and 4,096 tokens; at 6,144 and 8,128 neither is ahead on every text (four places
  a text, not tested for significance). `kv_head` is the default.
- What drops keys for good, a window or SnapKV, keeps up with Quest on prose and loses up to several times as much where
  a text comes back to what it said: code, and a reference with its recurring forms.
- InfLLM at a budget loses about what a window of its size does, or more: blocks are found by what local attention
  looks at. Its default keeps a window of 4,096 tokens and 2,048 of blocks, so that little is left out
  here, but for 8,128 tokens, where it loses 0.13 on the technical text.
- RetroInfer, measured at 2,048 tokens alone, loses less there with 1.8 % of the clusters read and 23 % estimated, its
  default, than Quest or SnapKV at an eighth, and at an eighth less than ShadowKV at an eighth, on each text.
  Without estimation it loses 0.16 where it loses 0.12 with it. Of the blocks of the clusters that it reads 80 % are in
  its cache in HBM, 92 % at an eighth.
- A default budget of 2,048 tokens (Quest, ShadowKV, SnapKV; 2,000 of `sink-window`) is the row 1/4 at 8,128 tokens, and
  everything at 2,048.
"""

INTRODUCTION = """
## On a model that retrieves

From `benchmarks/results/quality.json` ({device}; {dtype}, {date}, commit {commit}).
All that select keep their first tokens but RetrievalAttention's graph, which scanned its share alone there, without the
least number of keys of its default; this model was trained to have no need of sinks. With a head added to each layer
that rests on the first token it has: full attention answers as before, and a window, Quest, Squeezed Attention,
ShadowKV and RetroInfer answer as long as they keep that token (`tests/runtime/test_needle_sinks.py`).

needle-28m is a small Llama trained to retrieve over 32,768 tokens (`runtime/needle/README.md`). Each figure is the
share of examples answered exactly, over contexts of 8K, 16K and 32K; *examples* says how many stand behind one figure.
With thirty, differences under ten points are noise, with nine those under thirty. Budgets are shares of the context.
A row of another run, or of some of the contexts alone, says so.
*Kept* is what one sequence of 32K holds per tier (full attention: 256 MiB), *moved* what PCIe carries for each decoded
token at 32K on `niah_single`, the prompt's offloading included. The two tables differ in when the cache is built: with
the question at the prompt's end, or before the question, which then follows as a turn of its own; the second is the
honest case for a cache that is reused.

- Policies that keep every key and read those that matter by exact or nearly exact scores (RetrievalAttention, and
  Squeezed Attention at a tenth or a twentieth of the keys) answer as full attention does, seen or not.
- RetroInfer's defaults (1.8 % of the clusters read) answered all 23 examples of 8K that were tried, seen or not; longer
  contexts were not.
- Policies that judge keys by a summary of their chunk lose what hides in it: Quest's page bounds and ShadowKV's chunk
  means recover with the budget, and ShadowKV at the 1/64 of its paper is far below full attention on this model. That
  is the method here, not this implementation: a second one, written apart on the stock model, scored the same in six
  cells at 2K. A needle is a few tokens in a chunk of eight whose mean says little of it, which its paper's larger
  models seem to forgive.
- Quest for each query head reads 1.6 times the bytes here, and answers 23 of 30 of `kv_recall`; for each KV head at
  2/11 it reads fewer than that and answers 26.
- Policies that drop keys when the prompt ends (SnapKV) answer what they have seen asked, and little else.
- A window forgets. InfLLM gives all distant keys one position, for which this model was not trained, and finds blocks
  by what local attention looks at, which a needle is not: it answers no more than a window does, one by one or in a
  batch.
"""


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes else "0"


def _kib(nbytes: float) -> str:
    return f"{nbytes / 2**10:,.0f} KiB" if nbytes else "0"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--policies", nargs="+", default=list(WAYS), metavar="NAME", help="beginnings of table rows")
    parser.add_argument("--commit", default=None, help="where there is no git")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    old = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if arguments.page:
        PAGE.write_text(page(old, json.loads(REAL_TEXT.read_text())), encoding="utf-8")
        return
    with TemporaryDirectory() as folder:
        dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(expand(Path(folder) / "needle"), dtype=dtype)
        model = model.eval().to(arguments.device)
        # In a batch of unequal prompts a row goes on after its answer: nothing that counts lies beyond the positions.
        model.config.max_position_embeddings += 128
        run = {
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {platform.machine()}",
            "date": time.strftime("%Y-%m-%d"),
            "dtype": str(dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": arguments.commit or _git("describe", "--always", "--dirty", "--abbrev=12"),
            "command": "python benchmarks/quality.py " + " ".join(sys.argv[1:]),
        }
        ways = [way for way in WAYS if any(way.startswith(name) for name in arguments.policies)]
        batches = list(groups(arguments.tasks, arguments.lengths, arguments.examples))
        runs = (measure(model, way, mode, batches) for way in ways for mode in arguments.modes)
        for row in chain.from_iterable(runs):
            old = merged(old, row, run)
            arguments.out.write_text(json.dumps(old, indent=1) + "\n")
            shown = [row[name] for name in ("way", "mode", "task", "length_tokens", "right", "examples")]
            sys.stdout.write("{:40s} {:7s} {:16s} {:6,d} {:3d} of {:2d}".format(*shown) + f" {row['seconds']:6.1f} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
