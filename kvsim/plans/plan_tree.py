"""A layer's plan as a tree for people: what is stored, what waits for what, and what each operation costs."""

from collections.abc import Iterable, Iterator, Mapping
from io import StringIO

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from kvsim.text.printable import printable
from kvsim.text.units import format_bytes
from policies import LayerPlan, ModelShape, Policy, Step, plan_layer
from policies.plan import Access, Buffer, Compute, Copy, Count, Op, Rows, Sync, Work, flops, moved_bytes, stored_bytes

_PLAIN_WIDTH = 1000  # no terminal is there to wrap lines for


def plan_tree(policy: Policy, model: ModelShape, step: Step, layer: int) -> Tree:
    """What `policy` stores and does on one layer in one step, data-dependent counts at their expected values.

    An operation stands below the one that it waits for, the last listed one when there are several; the others follow
    as `and after`. What it reads and writes comes before what waits for it.

    Raises ValueError where the policy cannot plan the layer.
    """
    plan = plan_layer(policy, model, step, layer)
    totals = {count.name: count.expected() for count in plan.counts}
    tree = Tree(_text(f"{plan.policy.name}: {_step_text(step)}, layer {layer} of {model.name}"))
    tree.add(_text(f"source: {plan.policy.paper}"))
    if plan.policy.trained:
        tree.add(_text(f"needs training: {plan.policy.trained}"))
    _grow(tree, "stored", (_buffer_text(b) for b in plan.buffers if not b.view))
    _grow(tree, "handed over by the model, or a view of other rows", (_buffer_text(b) for b in plan.buffers if b.view))
    _grow_operations(tree.add("operations"), plan, totals)
    _grow(tree, "counts that data decide, per sequence", map(_count_text, plan.counts))
    _grow(tree, "sums", _sum_texts(plan, totals))
    return tree


def plan_text(policy: Policy, model: ModelShape, step: Step, layer: int) -> str:
    """The same tree as plain text."""
    out = StringIO()
    Console(file=out, width=_PLAIN_WIDTH, color_system=None).print(plan_tree(policy, model, step, layer))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _text(line: str) -> Text:
    """A line as it is, without markup, and without what would steer a terminal."""
    return Text(printable(line))


def _grow(tree: Tree, title: str, texts: Iterable[str]) -> None:
    lines = list(texts)
    if lines:
        branch = tree.add(title)
        for line in lines:
            branch.add(_text(line))


def _grow_operations(root: Tree, plan: LayerPlan, totals: Mapping[str, int]) -> None:
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    branches = {"qkv": root.add(_text("qkv: the model's own, before the policy"))}
    for op in plan.ops:
        here = [name for name in op.after if name in branches]
        parent = max(here, key=list(branches).index, default=None)
        others = [name for name in op.after if name != parent]
        waits = f"; and after {', '.join(others)}" if others else ""
        branch = (branches[parent] if parent else root).add(_text(f"{op.name}: {_op_text(op, buffers, totals)}{waits}"))
        if isinstance(op, Compute):
            for verb, accesses in (("reads", op.reads), ("writes", op.writes)):
                for access in accesses:
                    branch.add(_text(f"{verb} {_access_text(access, buffers[access.buffer], totals)}"))
        branches[op.name] = branch


def _op_text(op: Op, buffers: Mapping[str, Buffer], totals: Mapping[str, int]) -> str:
    if isinstance(op, Sync):
        return "the host waits for the device"
    if isinstance(op, Copy):
        src, dst = buffers[op.src], buffers[op.dst]
        ids = f" at {', '.join(op.ids)}" if op.ids else ""
        moved = _rows_text(op.rows, totals, src.row_bytes)
        return f"{op.engine} copies {src.name} ({src.tier}) to {dst.name} ({dst.tier}){ids}: {moved}"
    parts = [f"{op.processor} {op.work}"]
    rows = op.rows.at(totals)
    if op.work is Work.TOPK:
        parts.append(f"{rows:,} elements searched")
    elif rows:
        parts.append(f"{rows:,} rows x {op.flops_per_row:,} FLOP = {rows * op.flops_per_row:,} FLOP")
    if op.draws:
        parts.append(f"draws {', '.join(op.draws)}")
    return "; ".join(parts)


def _access_text(access: Access, buffer: Buffer, totals: Mapping[str, int]) -> str:
    where = "at indices, " if access.scattered else ""
    return f"{access.buffer}: {where}{_rows_text(access.rows, totals, buffer.row_bytes)}"


def _rows_text(rows: Rows, totals: Mapping[str, int], row_bytes: int) -> str:
    number = rows.at(totals)
    drawn = f" (expected, from {', '.join(name for name, _ in rows.counts)})" if rows.counts else ""
    return f"{number:,} rows x {row_bytes:,} B = {number * row_bytes:,} B{drawn}"


def _buffer_text(buffer: Buffer) -> str:
    shape = " x ".join(f"{size:,}" for size in buffer.row_shape)
    ring = f", a ring of {buffer.ring} for all layers" if buffer.ring and not buffer.view else ""
    nbytes = f"{buffer.nbytes:,} B ({format_bytes(buffer.nbytes)})"
    return f"{buffer.name}: {buffer.tier} {buffer.rows:,} rows x ({shape}) {buffer.dtype} = {nbytes}{ring}"


def _count_text(count: Count) -> str:
    heads = "" if count.heads == 1 else f" for each of {count.heads} heads"
    share = count.expected() / (count.heads * count.maximum) if count.maximum else 0.0
    spread = f"{share:.0%} (standard deviation {count.spread:.1%}) of at most {count.maximum:,}{heads}"
    return f"{count.name}: {count.expected():,} expected = {spread}; source: {count.source}"


def _sum_texts(plan: LayerPlan, totals: Mapping[str, int]) -> Iterator[str]:
    yield f"computed: {flops(plan.ops, totals):,} FLOP"
    for (src, dst), nbytes in sorted(moved_bytes(plan.ops, plan.buffers, totals).items()):
        yield f"moved {src} to {dst}: {nbytes:,} B ({format_bytes(nbytes)})"
    for tier, nbytes in sorted(stored_bytes([plan.buffers]).items()):
        yield f"stored in {tier}: {nbytes:,} B ({format_bytes(nbytes)}), rings included"


def _step_text(step: Step) -> str:
    if not step.prefilling:
        return f"decode of output token {step.generated_tokens:,} after a prompt of {step.prompt_tokens:,} tokens"
    chunk = f"{step.new_tokens:,} tokens after {step.past_tokens:,} of a prompt of {step.prompt_tokens:,}"
    return f"prefill of {chunk}{', which they complete' if step.last_chunk else ''}"
