"""The printed plan says what the plan says: every number shown adds up to the plan's own sums."""

import re
from dataclasses import replace

import pytest
from rich.tree import Tree

from kvsim.models import load_model
from kvsim.plans.plan_tree import plan_text, plan_tree
from policies import POLICIES, Step, parse_policy, plan_layer
from policies.plan import Compute, Tier, Work, flops, moved_bytes, stored_bytes

LLAMA = load_model("llama-3.1-8b")
DECODE = Step.decoding(122 * 1024, 1)
STEPS = [DECODE, Step(prompt_tokens=9000, past_tokens=0, new_tokens=9000)]
VARIANTS = [*POLICIES, "squeezed-attention:tier=ddr,levels=2", "full@heads=2+shadowkv@heads=6"]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def bare(lines: list[str]) -> list[str]:
    """Lines without the guides of the tree."""
    return [line.lstrip(" │├└─") for line in lines]


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_what_operations_show_adds_up(text: str, step: Step) -> None:
    policy = parse_policy(text)
    plan = plan_layer(policy, LLAMA, step, 5)
    totals = {count.name: count.expected() for count in plan.counts}
    lines = bare(plan_text(policy, LLAMA, step, 5).splitlines())

    moved: dict[tuple[str, str], int] = {}
    for line in lines:
        if copy := re.search(r" copies \S+ \((\w+)\) to \S+ \((\w+)\).*: [\d,]+ rows x [\d,]+ B = ([\d,]+) B", line):
            moved[copy[1], copy[2]] = moved.get((copy[1], copy[2]), 0) + number(copy[3])
    assert moved == {(str(a), str(b)): n for (a, b), n in moved_bytes(plan.ops, plan.buffers, totals).items()}

    shown_flops = sum(number(n) for line in lines for n in re.findall(r"FLOP = ([\d,]+) FLOP", line))
    assert shown_flops == flops(plan.ops, totals)
    assert f"computed: {shown_flops:,} FLOP" in lines

    row_bytes = {buffer.name: buffer.row_bytes for buffer in plan.buffers}
    accessed = sum(
        access.rows.at(totals) * row_bytes[access.buffer]
        for op in plan.ops
        if isinstance(op, Compute)
        for access in (*op.reads, *op.writes)
    )
    shown = [re.search(r" = ([\d,]+) B", line) for line in lines if line.startswith(("reads ", "writes "))]
    assert sum(number(match[1]) for match in shown if match) == accessed
    searched = sum(op.rows.at(totals) for op in plan.ops if isinstance(op, Compute) and op.work is Work.TOPK)
    assert sum(number(n) for line in lines for n in re.findall(r"([\d,]+) elements searched", line)) == searched


@pytest.mark.parametrize("text", VARIANTS)
def test_buffers_show_what_is_stored(text: str) -> None:
    policy = parse_policy(text)
    plan = plan_layer(policy, LLAMA, DECODE, 5)
    lines = bare(plan_text(policy, LLAMA, DECODE, 5).splitlines())
    held = lines[lines.index("stored") + 1 : lines.index("handed over by the model, or a view of other rows")]
    shown: dict[str, int] = {}
    for line in held:
        buffer = re.fullmatch(r"\S+: (\w+) [\d,]+ rows x \(.*\) \w+ = ([\d,]+) B \(.*\)(?:, a ring of (\d+) .*)?", line)
        assert buffer is not None, line
        shown[buffer[1]] = shown.get(buffer[1], 0) + number(buffer[2]) * int(buffer[3] or 1)
    expected = {tier: n for tier, n in stored_bytes([plan.buffers]).items() if n}
    assert shown == {str(tier): n for tier, n in expected.items()}
    for tier, nbytes in expected.items():
        assert any(line.startswith(f"stored in {tier}: {nbytes:,} B") for line in lines)


def test_every_operation_stands_below_what_it_waits_for() -> None:
    for text in VARIANTS:
        for step in STEPS:
            policy = parse_policy(text)
            tree = plan_tree(policy, LLAMA, step, 5)
            (operations,) = (branch for branch in tree.children if str(branch.label) == "operations")
            ops = {op.name: op for op in plan_layer(policy, LLAMA, step, 5).ops}
            seen = walk(operations, None, {})
            assert seen.pop("qkv") is None
            assert seen.keys() == ops.keys()
            for name, parent in seen.items():
                here = [other for other in ops[name].after if "@" not in other]
                assert (parent in here) if here else (parent is None), name


def walk(tree: Tree, parent: str | None, found: dict[str, str | None]) -> dict[str, str | None]:
    """The parent of every operation in the tree."""
    for branch in tree.children:
        name = str(branch.label).partition(":")[0]
        if name.startswith(("reads ", "writes ")):
            continue
        found[name] = parent
        walk(branch, name, found)
    return found


def test_shadowkv_reads_as_its_paper_does() -> None:
    text = plan_text(parse_policy("shadowkv"), LLAMA, DECODE, 5)
    lines = bare(text.splitlines())
    assert lines[0] == "shadowkv: decode of output token 1 after a prompt of 124,928 tokens, layer 5 of llama-3.1-8b"
    # 102 of 256 chunks miss in each of 8 heads; a chunk of values is 8 x 128 x 2 bytes.
    assert (
        "fetch: gather copies values_host (ddr) to v_slots (hbm) at slot_ids: "
        "816 rows x 2,048 B = 1,671,168 B (expected, from miss)"
    ) in lines
    assert (
        "miss: 816 expected = 40% (standard deviation 10.0%) of at most 256 for each of 8 heads; "
        "source: ShadowKV section 4: 60 % of the chunks are chosen again"
    ) in lines
    assert "moved ddr to hbm: 1,671,168 B (1.594 MiB)" in lines
    assert any(line.startswith("u: hbm 124,928 rows x (160) bf16 = 39,976,960 B (38.12 MiB)") for line in lines)
    # 256 chunks, 50 exact ones (48 outliers, 2 for the sinks), a tail of 64 tokens and the new one.
    assert any(line.startswith("attend: sm attention; 2,513 rows x 16,384 FLOP") for line in lines)
    assert any(line.endswith("; and after append, fetch") for line in lines)
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_steps_and_waits_on_earlier_layers_are_named() -> None:
    chunk = Step(prompt_tokens=9000, past_tokens=4000, new_tokens=1000)
    lines = bare(plan_text(parse_policy("offload-all"), LLAMA, chunk, 5).splitlines())
    assert lines[0].startswith("offload-all: prefill of 1,000 tokens after 4,000 of a prompt of 9,000, layer 5 of")
    copied = "fetch: dma copies kv_host (ddr) to kv (hbm): 4,000 rows x 4,096 B = 16,384,000 B"
    assert f"{copied}; and after attend@-2, store@-2" in lines
    assert any(", a ring of 2 for all layers" in line for line in lines if line.startswith("kv: "))
    last = Step(prompt_tokens=9000, past_tokens=8000, new_tokens=1000)
    assert ", which they complete, layer 5" in plan_text(parse_policy("full"), LLAMA, last, 5)
    assert "the host waits for the device" in plan_text(parse_policy("retrieval-attention"), LLAMA, DECODE, 5)


def test_brackets_in_names_are_not_read_as_markup() -> None:
    odd = replace(LLAMA, name="my[bold]model")
    assert "my[bold]model" in plan_text(parse_policy("full"), odd, DECODE, 0)


def test_a_layer_that_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="quest needs keys per KV head"):
        plan_tree(parse_policy("quest"), load_model("deepseek-v3"), DECODE, 0)


def test_the_dense_fallback_is_named_as_what_runs() -> None:
    lines = plan_text(parse_policy("shadowkv"), LLAMA, Step.decoding(100, 1), 0).splitlines()
    assert lines[0].startswith("full: decode of output token 1 after a prompt of 100 tokens")
    assert Tier.DDR not in {line.split()[0] for line in lines}
