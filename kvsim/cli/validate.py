"""`kvsim validate`: whether what the runtime does is what the simulator says."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli import TargetUnmet
from kvsim.cli.extras import require_runtime
from kvsim.cli.output import Columns, JsonFlag, print_json, print_line, print_table
from kvsim.cli.progress import progress_bar
from kvsim.text.units import parse_tokens

if TYPE_CHECKING:
    from policies import Policy

# Parameters so small that a prompt of some hundred tokens builds each policy's index and overflows its budget.
TRIED = {
    "offload-all": ("offload-all", "offload-all:write_back=all"),
    "sink-window": ("sink-window:window_tokens=64", "sink-window:window_tokens=64,positions=original"),
    "snapkv": ("snapkv:budget_tokens=128",),
    "quest": ("quest:budget_tokens=128",),
    "infllm": ("infllm:sink_tokens=16,window_tokens=128,block_tokens=16,top_k=4,cache_blocks=8,execution_tokens=64",),
    "squeezed-attention": (
        "squeezed-attention:observation_tokens=32",
        "squeezed-attention:observation_tokens=32,tier=ddr",
        "squeezed-attention:observation_tokens=32,tier=ddr,levels=2",
        "squeezed-attention:observation_tokens=32,tier=ddr,budget_tokens=64",
    ),
    "shadowkv": ("shadowkv:budget_tokens=128,rank=32,outlier_chunks=4",),
    "retrieval-attention": tuple(
        f"retrieval-attention:sink_tokens=16,window_tokens=64,top_k=16,{index}"
        for index in ("degree=8", "index=ivf,lists=16", "index=flat")
    ),
    "retroinfer": (
        "retroinfer:window_tokens=16,update_tokens=64,retrieval=0.2",
        "retroinfer:sink_tokens=2,window_tokens=8,cluster_tokens=2,block_tokens=3,update_tokens=4,retrieval=0.3",
    ),
}
COMPOSED = ("full@layers=0-1+offload-all",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy's bytes by quantity (`hbm`, `ddr->hbm`) and by who says so; `faults` says where they disagree."""

    policy: str
    held_bytes: dict[str, dict[str, int]]
    moved_bytes: dict[str, dict[str, int]]
    elsewhere_bytes: dict[str, int]
    faults: list[str]

    @property
    def agree(self) -> bool:
        """Whether all counts are the same integers."""
        return not self.faults


def validate(
    in_bytes: Annotated[
        bool, typer.Option("--bytes", help="Bytes held and moved: the runtime, the simulator and an audit beside it.")
    ] = False,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="POLICY", help="name or name:key=value,...; repeat it. Default: all that are executed."),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="DIR", help="A folder with a model, or the one that is shipped.")
    ] = "needle-28m",
    prompt: Annotated[str, typer.Option(metavar="N", help="Tokens of each prompt: 500, 8k.")] = "500",
    new: Annotated[str, typer.Option(metavar="N", help="Tokens to generate for each.")] = "16",
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts at a time, of unequal length.")] = 2,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Default: a GPU where there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Default: fp32 on a CPU, as stored on a GPU.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Run policies on a model and compare every byte with the simulator's: the exit code is 3 when they disagree."""
    if not in_bytes:
        raise ValueError("say what to validate: --bytes")
    sizes = {"prompt_tokens": parse_tokens(prompt), "new_tokens": parse_tokens(new), "batch": batch}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"--{name.removesuffix('_tokens')} {value} must be at least 1")
    require_runtime()
    from runtime.loading import load_model, model_folder

    with model_folder(model) as folder:
        loaded = load_model(folder, device, dtype)
    tried = list(_tried(loaded, policy))
    with progress_bar("policies", len(tried)) as show:
        rows: list[Row] = []
        for text, tried_policy in tried:
            rows.append(_row(loaded, text, tried_policy, sizes))
            show(len(rows))
    _print(
        rows, {"model": model, "device": str(loaded.device), "dtype": str(loaded.dtype).removeprefix("torch.")}, json
    )
    if unequal := [row.policy for row in rows if not row.agree]:
        raise TargetUnmet(f"bytes disagree under {len(unequal)} of {len(rows)} policies: {'; '.join(unequal)}")


def _tried(model: Any, texts: Sequence[str] | None) -> Iterator[tuple[str, "Policy"]]:
    """The policies to run: those that are asked for, or all that the runtime executes, with a note for each other."""
    from policies import POLICIES, parse_policy
    from runtime.trial import refusal

    if texts:
        for text in texts:
            policy = parse_policy(text)
            if (why := refusal(model, policy)) is not None:
                raise ValueError(why)
            yield text, policy
        return
    said = set()
    for text in (*(text for name in POLICIES for text in TRIED.get(name, (name,))), *COMPOSED):
        policy = parse_policy(text)
        if (why := refusal(model, policy)) is None:
            yield text, policy
        elif why not in said:
            said.add(why)
            print_line(f"note: {text} is left out: {why}", err=True)


def _row(model: Any, text: str, policy: "Policy", sizes: dict[str, int]) -> Row:
    """Run one policy, replay its recording through the simulator's side, and compare."""
    from kvsim.plans.replay import replay_held_bytes, replay_moved_bytes
    from policies.plan import Tier
    from runtime.trial import try_policy

    try:
        trial = try_policy(model, policy, **sizes)
    except (RuntimeError, ValueError) as error:
        return Row(policy=text, held_bytes={}, moved_bytes={}, elsewhere_bytes={}, faults=[f"failed: {error}"])
    replayed = replay_moved_bytes(trial.recording, policy, trial.shape)
    planned = replay_held_bytes(trial.recording, policy, trial.shape, sizes["new_tokens"])
    held = {
        str(tier): {"runtime": trial.held_bytes[tier], "kvsim": planned[tier]}
        for tier in Tier
        if trial.held_bytes[tier] or planned[tier]
    }
    moved = {
        "->".join(link): {
            "runtime": trial.moved_bytes[link],
            "kvsim": replayed[link],
            "audit": trial.audited_bytes[link],
        }
        for link in sorted({*trial.moved_bytes, *replayed, *trial.audited_bytes})
    }
    faults = [f"{what} differs" for what, said in {**held, **moved}.items() if len(set(said.values())) > 1]
    faults += [f"{name} mixed both tiers {times} times" for name, times in trial.violations.items()]
    elsewhere = {"->".join(link): nbytes for link, nbytes in trial.elsewhere_bytes.items()}
    return Row(policy=text, held_bytes=held, moved_bytes=moved, elsewhere_bytes=elsewhere, faults=faults)


def _print(rows: Sequence[Row], inputs: dict[str, Any], json: bool) -> None:
    if json:
        print_json({"inputs": inputs, "policies": [{**asdict(row), "agree": row.agree} for row in rows]})
        return
    counted: Columns = dict.fromkeys(("runtime", "kvsim", "audit"), "right")
    columns: Columns = {"policy": "left", "bytes": "left", **counted, "agree": "left"}
    print_table(columns, (line for row in rows for line in _lines(row)))


def _lines(row: Row) -> Iterator[list[str]]:
    """A line for each quantity; the policy and the verdict stand in the first."""
    quantities = {f"held in {tier}": said for tier, said in row.held_bytes.items()}
    quantities |= {f"moved {link}": said for link, said in row.moved_bytes.items()}
    quantities = quantities or {"": {}}
    verdict = "; ".join(row.faults) or "yes"
    for number, (what, said) in enumerate(quantities.items()):
        counts = [f"{said[who]:,}" if who in said else "" for who in ("runtime", "kvsim", "audit")]
        yield ["" if number else row.policy, what, *counts, "" if number else verdict]
