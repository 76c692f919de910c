"""Where a policy is exact, its plan attends to what dense attention does: the same pairs, the same rows."""

from collections import Counter

import pytest

from kvsim.models import load_model
from policies import Full, LayerPlan, Step, parse_policy, plan_layer, resolve
from policies.plan import Compute, Work

LLAMA = load_model("llama-3.1-8b")
PAIR = 16384  # FLOPs of a query-key pair: 4 * 32 query heads * 128
STEPS = [
    Step(prompt_tokens=3000, past_tokens=0, new_tokens=3000),
    Step(prompt_tokens=3000, past_tokens=1000, new_tokens=700),
    Step.decoding(3000, 1),
    Step.decoding(3000, 17),
]


def planned(text: str, step: Step, layer: int = 5) -> LayerPlan:
    return plan_layer(parse_policy(text), LLAMA, step, layer)


def attention_flops(plan: LayerPlan) -> int:
    totals = {count.name: count.expected() for count in plan.counts}
    return sum(
        op.rows.at(totals) * op.flops_per_row
        for op in plan.ops
        if isinstance(op, Compute) and op.work is Work.ATTENTION
    )


def cache_bytes_read(plan: LayerPlan) -> int:
    """Bytes of keys and values that attention reads."""
    totals = {count.name: count.expected() for count in plan.counts}
    row_bytes = {buffer.name: buffer.row_bytes for buffer in plan.buffers}
    read: Counter[str] = Counter()
    for op in plan.ops:
        if isinstance(op, Compute) and op.work is Work.ATTENTION:
            for access in op.reads:
                read[access.buffer] += access.rows.at(totals) * row_bytes[access.buffer]
    return sum(nbytes for name, nbytes in read.items() if name not in ("q", "found"))


@pytest.mark.parametrize(
    "text",
    [
        "offload-all",
        "offload-all:write_back=all",
        "sink-window:sink_tokens=4,window_tokens=5000",  # the window covers the context
        "quest:budget_tokens=4096",  # every page is chosen
        "quest:budget_tokens=4096,per=query_head",
        "infllm",  # 3,017 tokens are inside the window of 4,096
        "squeezed-attention:keep=1",  # every key passes
        "squeezed-attention:keep=1,tier=ddr",
        "squeezed-attention:budget_tokens=100000",
        "snapkv:budget_tokens=3001",  # more than the prompt
        "shadowkv:budget_tokens=4096",  # fewer chunks than the budget takes
    ],
)
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_exact_limits_attend_to_everything(text: str, step: Step) -> None:
    plan, dense = planned(text, step), planned("full", step)
    assert attention_flops(plan) == attention_flops(dense)
    assert cache_bytes_read(plan) == cache_bytes_read(dense)


def test_sink_window_in_slot_positions_differs_by_the_rotation_alone() -> None:
    plan, dense = planned("sink-window:window_tokens=5000", STEPS[2]), planned("full", STEPS[2])
    (rotate,) = (op for op in plan.ops if op.name == "rotate")
    assert [op.name for op in plan.ops if op is not rotate] == [op.name for op in dense.ops]
    assert isinstance(rotate, Compute)
    assert (*rotate.reads, *rotate.writes) == ()


def test_flat_retrieval_of_all_indexed_keys_covers_every_pair() -> None:
    # 3,000 tokens less 640 near ones leave 2,360: the far part reads their values once for each query head.
    plan = planned("retrieval-attention:index=flat,top_k=2360", STEPS[2])
    totals: dict[str, int] = {}
    pairs = {op.name: op.rows.at(totals) for op in plan.ops if isinstance(op, Compute) and op.work is Work.ATTENTION}
    assert pairs == {"attend_near": 641, "attend_far": 32 * 2360}
    search = next(op for op in plan.ops if op.name == "search")
    assert isinstance(search, Compute)
    far_flops = search.rows.fixed * search.flops_per_row + 32 * 2360 * 2 * 128
    assert 641 * PAIR + far_flops == attention_flops(planned("full", STEPS[2]))


def test_quest_with_pages_of_one_token_is_exact_top_k() -> None:
    plan = planned("quest:page_tokens=1,budget_tokens=64", STEPS[2])
    assert attention_flops(plan) == 64 * PAIR


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("snapkv", 2048),
        ("snapkv:budget_tokens=100", 100),
        ("squeezed-attention", 125),  # 4 sinks, a window of 100 and the 21 keys that yield a centroid at 5 %
        ("shadowkv", 2528),  # 256 selected + 48 outliers + 1 = 305, aligned to 312, + 4 local; 8 tokens each
        ("shadowkv:budget_tokens=512", 672),  # 64 chosen, 12 outliers, 2 for the sinks, 1 more: 79 -> 80, + 4 local
        ("shadowkv:budget_tokens=64,rank=640", 640),  # a decomposition of fewer tokens has fewer columns
        ("retrieval-attention", 740),  # sinks 128 + window 512 + top 100
        ("retrieval-attention:index=ivf", 1152),  # as many keys as lists
    ],
)
def test_short_prompts_are_left_to_the_dense_cache(text: str, least: int) -> None:
    policy = parse_policy(text)
    below, at = (Step(prompt_tokens=n, past_tokens=0, new_tokens=n) for n in (least - 1, least))
    assert resolve(policy, LLAMA, below, 5) == Full()
    assert resolve(policy, LLAMA, at, 5) == policy
    assert plan_layer(policy, LLAMA, below, 5) == plan_layer(Full(), LLAMA, below, 5)


def test_shadowkv_always_leaves_more_landmarks_than_it_selects() -> None:
    for text in ("shadowkv", "shadowkv:budget_tokens=512", "shadowkv:chunk_tokens=4,budget_tokens=64,outlier_chunks=3"):
        policy = parse_policy(text)
        least = policy.minimum_prompt_tokens(LLAMA, 5)
        for prompt in range(least, least + 200):
            plan = plan_layer(policy, LLAMA, Step.decoding(prompt, 1), 5)
            rows = {buffer.name: buffer.rows for buffer in plan.buffers}
            assert rows["landmarks"] // 8 > policy.budget_chunks  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["squeezed-attention:levels=2", "squeezed-attention:centroid_share=0.02"])
def test_squeezed_has_a_centroid_on_each_level_from_its_shortest_prompt_on(text: str) -> None:
    policy = parse_policy(text)
    plan = plan_layer(policy, LLAMA, Step.decoding(policy.minimum_prompt_tokens(LLAMA, 5), 1), 5)
    rows = {buffer.name: buffer.rows for buffer in plan.buffers}
    assert rows["centroids"] >= 8
    assert rows.get("coarse_centroids", 8) >= 8
