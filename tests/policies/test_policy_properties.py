"""What holds for every policy at every step: lawful, race-free, pure, affine and additive plans."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.models import load_model
from policies import POLICIES, LayerPlan, ModelShape, Policy, RetroInfer, Step, parse_policy, plan_layer, plan_layers
from policies.plan import Buffer, Compute, Copy, Op, Sync, Tier, Work, flops, moved_bytes, stored_bytes
from policies.plan_rules import check_plan

VARIANTS = [
    *POLICIES,
    "offload-all:staging_layers=1",
    "offload-all:write_back=all",
    "sink-window:positions=original",
    "snapkv:per=query_head",
    "quest:per=query_head",
    "infllm:window_tokens=1000,sink_tokens=3,block_tokens=64,execution_tokens=256,top_k=4",
    "squeezed-attention:levels=2",
    "squeezed-attention:tier=ddr",
    "squeezed-attention:tier=ddr,levels=2,budget_tokens=512",
    "shadowkv:chunk_tokens=16,rank=64,outlier_chunks=0",
    "retrieval-attention:index=flat",
    "retrieval-attention:index=ivf",
    "retrieval-attention:index=ivf,scan_per=query_head",
    "retroinfer:update_tokens=128,sink_tokens=0,retrieval=0.1",
    "retroinfer:retrieval=1,estimation=0",
    "locret:budget_tokens=1000,chunk_tokens=512,stabilizer_tokens=100,local_tokens=0",
    "lazyllm:keep_2=1,keep_3=1,keep_4=1",
    "xattention:stride_tokens=8",
    "xattention:threshold=1",
    "hip:top_k=512,tokens_3=1024,tokens_2=2048,refresh_1=1,refresh_2=1,refresh_3=1",
    "lococo:memory_tokens=128,chunk_tokens=100,buffer_tokens=8",
    "landmark:top_k=12,window_tokens=500",
]
MODELS = [load_model(name) for name in ("llama-3.1-8b", "llama-2-7b", "llama-3.1-70b")]  # groups of 4, 1 and 8
LLAMA = MODELS[0]
CACHED = {  # buffers of raw keys and values, in the cache's own type
    *("kv", "kv_host", "keys", "values", "raw_keys", "raw_values", "k_exact", "v_exact", "k_slots", "v_slots"),
    *("values_host", "k_near", "v_near", "index_values", "local", "rest", "cached", "blocks"),
    *("exact", "prefix", "staged"),
    *("clusters", "arranged", "leaving"),
    *("chunk_keys", "chunk_values", "found_blocks"),
}


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Whole prompts, chunks of them, recomputed ones with output that was already there, decode steps."""
    prompt = draw(st.integers(1, 40_000))
    kind = draw(st.sampled_from(["whole", "chunk", "last", "recompute", "decode"]))
    if kind == "whole":
        return Step(prompt_tokens=prompt, past_tokens=0, new_tokens=prompt)
    if kind == "recompute":
        return Step(prompt_tokens=prompt, past_tokens=0, new_tokens=prompt + draw(st.integers(1, 500)))
    if kind == "decode":
        return Step.decoding(prompt, draw(st.integers(1, 3000)))
    past = draw(st.integers(0, prompt - 1))
    new = prompt - past if kind == "last" else draw(st.integers(1, prompt - past))
    return Step(prompt_tokens=prompt, past_tokens=past, new_tokens=new)


def expected(plan: LayerPlan) -> dict[str, int]:
    return {count.name: count.expected() for count in plan.counts}


@pytest.mark.parametrize("text", [*VARIANTS, "full@layers=0-3+retroinfer"])
@given(step=steps(), model=st.sampled_from([LLAMA, load_model("gemma-3-27b")]))
@settings(max_examples=15)
def test_layers_that_share_a_plan_have_each_the_same_one(text: str, step: Step, model: ModelShape) -> None:
    policy = parse_policy(text)
    plans = plan_layers(policy, model, step)
    assert plans == [plan_layer(policy, model, step, layer) for layer in range(model.n_layers)]
    if type(policy).by_shape:
        assert len({id(plan) for plan in plans}) == len(set(model.layers))
    apart = [[*plan.buffers] for plan in plans]  # a list for each layer: none is shared
    assert stored_bytes([plan.buffers for plan in plans]) == stored_bytes(apart)


class _Odd(RetroInfer):
    """Plans odd layers otherwise than its parent, which has one plan for all."""

    def decode(self, model: ModelShape, step: Step, layer: int) -> tuple[Op, ...]:
        return super().decode(model, step, layer)[: None if layer % 2 else -1]


def test_a_subclass_says_anew_whether_shapes_alone_decide() -> None:
    plans = plan_layers(_Odd(), LLAMA, Step.decoding(20_000, 7))
    assert plans[1] != plans[0] == plans[2]


@pytest.mark.parametrize("text", VARIANTS)
@given(step=steps(), model=st.sampled_from(MODELS), layer=st.sampled_from([0, 2, 31]))
@settings(max_examples=30)
def test_plans_are_lawful_pure_and_plain_data(text: str, step: Step, model: ModelShape, layer: int) -> None:
    policy = parse_policy(text)
    plan = plan_layer(policy, model, step, layer)
    check_plan(plan.ops, plan.buffers, plan.counts)
    again = plan_layer(parse_policy(text), model, step, layer)
    assert again == plan
    assert hash(again) == hash(plan)
    assert repr(again) == repr(plan)
    totals = expected(plan)
    for op in plan.ops:
        if not isinstance(op, Sync):
            assert op.rows.at(totals) >= 0
        if isinstance(op, Compute):
            assert all(access.rows.at(totals) >= 0 for access in (*op.reads, *op.writes))
    assert all(buffer.nbytes >= 0 for buffer in plan.buffers)
    assert all(count.maximum >= 0 for count in plan.counts)


@pytest.mark.parametrize("text", VARIANTS)
@given(prompt=st.integers(3000, 40_000), generated=st.integers(1, 3000))
@settings(max_examples=20)
def test_decode_touches_no_more_rows_than_a_buffer_has(text: str, prompt: int, generated: int) -> None:
    plan = plan_layer(parse_policy(text), LLAMA, Step.decoding(prompt, generated), 5)
    rows = {buffer.name: buffer.rows for buffer in plan.buffers}
    most = {count.name: count.heads * count.maximum for count in plan.counts}
    staged = {"staged"}  # what exceeds them comes in waves
    for op in plan.ops:
        # Two softmax passes; lists scanned once for each head of a group; rows of U read for each KV head.
        passes = {
            "score": 2,
            "score_coarse": 2,
            "aggregate": 2,
            "search": 4,
            "rebuild": 8,
            "stage_3": 8,
            "stage_2": 8,
        }.get(op.name, 1)
        if isinstance(op, Compute):
            for access in (*op.reads, *op.writes):
                if access.buffer not in staged:
                    assert access.rows.at(most) <= passes * rows[access.buffer], (op.name, access)


def lane(op: Op, buffers: dict[str, Buffer]) -> str:
    """The lane that runs an operation; each runs its operations in the order of the plan."""
    if isinstance(op, Copy):
        return "up" if buffers[op.dst].tier is Tier.HBM else "down"
    return op.processor.value if isinstance(op, Compute) else "sm"


def races(policy: Policy, model: ModelShape, step: Step, layers: int = 4) -> set[tuple[str, str, str]]:
    """Pairs of operations of two lanes that touch one buffer, one of them writing, with nothing to order them."""
    same_bytes = {
        "raw_value_chunks": "raw_values",
        "closing": "waiting",
        "prompt_keys": "kv",
    }  # views under another name
    before: list[set[int]] = []
    touched: list[list[tuple[object, bool]]] = []
    names: list[str] = []
    position: dict[tuple[int, str], int] = {}
    last_of_lane: dict[str, int] = {}

    def place(layer: int, name: str, after: tuple[str, ...], lane: str, touches: list[tuple[object, bool]]) -> None:
        waits = {last_of_lane[lane]} if lane in last_of_lane else set()
        for other in after:
            base, _, back = other.partition("@")
            if (at := position.get((layer + int(back or 0), base))) is not None:
                waits.add(at)
        position[layer, name] = last_of_lane[lane] = len(before)
        before.append(waits.union(*(before[i] for i in waits)))
        touched.append(touches)
        names.append(name)

    for layer in range(layers):
        plan = plan_layer(policy, model, step, layer)
        buffers = {buffer.name: buffer for buffer in plan.buffers}

        def piece(name: str, layer: int = layer, buffers: dict[str, Buffer] = buffers) -> object:
            ring = buffers[name].ring
            return same_bytes.get(name, name), f"slot {layer % ring}" if ring else f"layer {layer}"

        handed_over = [(piece(name), True) for name in ("q", "new_kv", "new_k", "new_v")]
        place(layer, "qkv", ("mlp@-1",), "sm", handed_over)
        for op in plan.ops:
            touches: list[tuple[object, bool]] = []
            if isinstance(op, Copy):
                touches = [(piece(op.src), False), (piece(op.dst), True), *((piece(name), False) for name in op.ids)]
            elif isinstance(op, Compute):
                touches = [(piece(access.buffer), False) for access in op.reads]
                touches += [(piece(access.buffer), True) for access in op.writes]
            place(layer, op.name, op.after, lane(op, buffers), touches)
        place(layer, "mlp", ("attend",), "sm", [(piece("out"), False)])
    return {
        (names[i], names[j], str(here))
        for j in range(len(before))
        for i in set(range(j)) - before[j]
        for here, writes in touched[i]
        for there, also_writes in touched[j]
        if here == there and (writes or also_writes)
    }


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize(
    "step",
    [
        Step(prompt_tokens=9000, past_tokens=0, new_tokens=9000),
        Step(prompt_tokens=9000, past_tokens=3000, new_tokens=3000),
        Step(prompt_tokens=9000, past_tokens=6000, new_tokens=3000),
        Step.decoding(9000, 1),
        Step.decoding(4096 + 128 + 126, 2),  # InfLLM closes a block
    ],
    ids=str,
)
def test_nothing_races(text: str, step: Step) -> None:
    # Offload-all fetches the rows of earlier tokens while it writes and sends back those of new ones.
    apart = {("fetch", "append"), ("fetch", "store")} if text.startswith("offload-all") else set()
    assert {race for race in races(parse_policy(text), LLAMA, step) if race[:2] not in apart} == set()


def test_the_race_detector_sees_a_missing_wait() -> None:
    class Hasty(type(parse_policy("shadowkv"))):  # type: ignore[misc]
        """ShadowKV whose attention does not wait for the values."""

        def decode(self, model: ModelShape, step: Step, layer: int) -> tuple[Op, ...]:
            return tuple(
                replace(op, after=tuple(name for name in op.after if name != "fetch")) if op.name == "attend" else op
                for op in super().decode(model, step, layer)
            )

    assert ("fetch", "attend", "('v_slots', 'layer 0')") in races(Hasty(), LLAMA, Step.decoding(9000, 1))


def amounts(text: str, step: Step, layer: int = 5) -> list[int]:
    """FLOPs, bytes moved each way, bytes stored per tier, bytes accessed in place: of one layer."""
    plan = plan_layer(parse_policy(text), LLAMA, step, layer)
    totals = expected(plan)
    row_bytes = {buffer.name: buffer.row_bytes for buffer in plan.buffers}
    accessed = sum(
        access.rows.at(totals) * row_bytes[access.buffer]
        for op in plan.ops
        if isinstance(op, Compute)
        for access in (*op.reads, *op.writes)
    )
    moved, stored = moved_bytes(plan.ops, plan.buffers, totals), stored_bytes([plan.buffers])
    up, down = moved[Tier.DDR, Tier.HBM], moved[Tier.HBM, Tier.DDR]
    return [flops(plan.ops, totals), up, down, stored[Tier.HBM], stored[Tier.DDR], accessed]


def differences(series: list[list[int]]) -> list[list[int]]:
    return [[b - a for a, b in zip(first, second, strict=True)] for first, second in pairwise(series)]


@pytest.mark.parametrize("text", VARIANTS)
def test_decode_is_affine_in_the_context(text: str) -> None:
    # Every 12,800 tokens are whole pages of 16, blocks of 128, 64 and 50, chunks of 512, 256 and 100, and 640 and 128
    # centroids.
    first, apart = 48_100, 12_800
    if text.startswith("retroinfer"):  # whole segments of 8,192 whose shares of clusters and misses are whole, too
        first = apart = 8192 * 10**9
    series = [amounts(text, Step.decoding(first + apart * i, 1)) for i in range(6)]
    assert not any(any(row) for row in differences(differences(series)))


@pytest.mark.parametrize("text", VARIANTS)
def test_decode_is_affine_in_generated_tokens_but_for_page_and_block_edges(text: str) -> None:
    series = [amounts(text, Step.decoding(48_100, generated)) for generated in range(1, 202)]
    bent = [i for i, row in enumerate(differences(differences(series))) if any(row)]
    edges = {"quest": 16, "infllm": 64, "hip": 1, "lococo": 8, "landmark": 50, "lazyllm": 1}
    if "update_tokens" in text:
        edges["retroinfer"] = 128
    edge_tokens = edges.get(text.partition(":")[0])
    if edge_tokens is None:
        assert bent == []
    else:  # an edge bends the line on the way in and on the way out
        assert len(bent) <= 3 * (201 // edge_tokens + 1)


@pytest.mark.parametrize("text", VARIANTS)
@given(prompt=st.integers(1, 30_000), chunk=st.sampled_from([512, 2048, 8192]))
@settings(max_examples=15)
def test_chunks_of_a_prompt_attend_to_as_much_as_the_whole(text: str, prompt: int, chunk: int) -> None:
    def attention_flops(step: Step) -> int:
        plan = plan_layer(parse_policy(text), LLAMA, step, 5)
        attention = tuple(op for op in plan.ops if isinstance(op, Compute) and op.work is Work.ATTENTION)
        return flops(attention, {count.name: 0 for count in plan.counts})  # what data decide comes on top

    whole = attention_flops(Step(prompt_tokens=prompt, past_tokens=0, new_tokens=prompt))
    in_chunks = sum(
        attention_flops(Step(prompt_tokens=prompt, past_tokens=past, new_tokens=min(chunk, prompt - past)))
        for past in range(0, prompt, chunk)
    )
    assert in_chunks == whole


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("past", [0, 6000])
def test_what_decode_holds_is_there_when_the_prompt_is_complete(text: str, past: int) -> None:
    def kept(step: Step) -> dict[str, tuple[Tier, tuple[int, ...], str, int]]:
        plan = plan_layer(parse_policy(text), LLAMA, step, 5)
        # A step sizes to itself: rings, and with these names what fills as tokens come.
        own = {"kv", "local"}
        return {
            b.name: (b.tier, b.row_shape, b.dtype, 0 if b.name in own else b.rows)
            for b in plan.buffers
            if not (b.view and b.ring) and not b.ring and b.name not in ("raw_keys", "raw_values", "closing")
        }

    prompt = 9000
    last = kept(Step(prompt_tokens=prompt, past_tokens=past, new_tokens=prompt - past))
    after = kept(Step(prompt_tokens=prompt, past_tokens=prompt, new_tokens=0))
    assert {name: last.get(name) for name in after} == after


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("step", [Step.decoding(9000, 3), Step(prompt_tokens=9000, past_tokens=0, new_tokens=9000)])
def test_a_narrower_cache_type_shrinks_cached_keys_and_values_alone(text: str, step: Step) -> None:
    policy = parse_policy(text)
    wide = {b.name: b for b in plan_layer(policy, LLAMA, step, 5).buffers if not b.view}
    for dtype in ("fp8", "int8", "int4"):
        for buffer in plan_layer(policy, replace(LLAMA, kv_dtype=dtype), step, 5).buffers:
            if buffer.view:
                continue
            before = wide[buffer.name].nbytes
            elements = before // 2  # of two bytes each in bf16
            vectors = elements // 128  # int8: an fp16 scale a vector; int4: a scale and a zero for each 64
            after = {"fp8": elements, "int8": elements + 2 * vectors, "int4": elements // 2 + 8 * vectors}[dtype]
            assert buffer.nbytes == (after if buffer.name in CACHED else before), (buffer.name, dtype)


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("step", [Step.decoding(9000, 3), Step(prompt_tokens=9000, past_tokens=0, new_tokens=9000)])
def test_two_ranks_hold_the_cache_of_one(text: str, step: Step) -> None:
    def held(model: ModelShape) -> Counter[str]:
        return Counter({b.name: b.nbytes for b in plan_layer(parse_policy(text), model, step, 5).buffers if not b.view})

    one, rank = held(LLAMA), held(LLAMA.shard(2))
    assert {name: 2 * rank[name] for name in one.keys() & CACHED} == {name: one[name] for name in one.keys() & CACHED}
    replicated = {name for name in one if 2 * rank[name] != one[name]}
    # All heads share ShadowKV's U, InfLLM's choice, Squeezed Attention's threshold, RetrievalAttention's padding.
    assert replicated <= {"u", "chosen", "chosen_host", "resident", "thresholds", "padding", "padding_host"}


def test_every_policy_names_its_paper_and_has_a_variant_here() -> None:
    assert {text.partition(":")[0] for text in VARIANTS} == set(POLICIES)
    for name, cls in POLICIES.items():
        assert cls.name == name
        assert cls.paper
