"""Bytes and FLOPs of every policy against counts by hand, from published formulas and shapes.

Llama-3.1-8B: 32 layers, 32 query heads over 8 KV heads of 128 in bf16, so a key or a value of all KV heads has
8 * 128 * 2 = 2,048 bytes, a token 4,096 per layer, and a query-key pair costs 4 * 32 * 128 = 16,384 FLOPs.
"""

from collections import Counter
from dataclasses import replace

import pytest

from kvsim.models import load_model, model_names
from policies import LayerPlan, ModelShape, Step, parse_policy, plan_end, plan_layer
from policies.plan import Compute, Tier, flops, moved_bytes, stored_bytes

LLAMA = load_model("llama-3.1-8b")
MHA = load_model("llama-2-7b")  # 32 layers of 32 KV heads of 128: one query head each
WIDE = load_model("llama-3.1-70b")  # 80 layers of 64 query heads over 8 KV heads of 128: eight each
GIB = 2**30
KV, PAIR = 4096, 16384
CONTEXT = 131_072
DOWN, UP = (Tier.HBM, Tier.DDR), (Tier.DDR, Tier.HBM)


def whole(prompt_tokens: int) -> Step:
    return Step(prompt_tokens=prompt_tokens, past_tokens=0, new_tokens=prompt_tokens)


def planned(text: str, step: Step, model: ModelShape = LLAMA, layer: int = 5) -> LayerPlan:
    return plan_layer(parse_policy(text), model, step, layer)


def expected(plan: LayerPlan) -> dict[str, int]:
    return {count.name: count.expected() for count in plan.counts}


def moved(plan: LayerPlan) -> Counter[tuple[Tier, Tier]]:
    return moved_bytes(plan.ops, plan.buffers, expected(plan))


def work(plan: LayerPlan, *names: str) -> int:
    return flops(tuple(op for op in plan.ops if not names or op.name in names), expected(plan))


def stored(text: str, step: Step, model: ModelShape = LLAMA) -> Counter[Tier]:
    return stored_bytes([planned(text, step, model, layer).buffers for layer in range(model.n_layers)])


def held(plan: LayerPlan, *names: str) -> int:
    return sum(buffer.nbytes for buffer in plan.buffers if buffer.name in names)


def read(plan: LayerPlan, op: str) -> dict[str, int]:
    """Bytes that an operation reads, by buffer."""
    sizes = {buffer.name: buffer.row_bytes for buffer in plan.buffers}
    compute = next(o for o in plan.ops if o.name == op)
    assert isinstance(compute, Compute)
    totals = expected(plan)
    return {access.buffer: access.rows.at(totals) * sizes[access.buffer] for access in compute.reads}


def test_full_decode() -> None:
    step = Step.decoding(CONTEXT - 1, 1)  # 131,072 tokens held
    plan = planned("full", step)
    assert stored("full", step) == {Tier.HBM: 16 * GIB}  # 131,072 * 32 * 4,096
    assert moved(plan) == {}
    assert work(plan) == PAIR * CONTEXT
    assert read(plan, "attend") == {"q": 32 * 128 * 2, "kv": KV * CONTEXT}


def test_full_prefill_costs_two_n_squared_per_head_and_dimension() -> None:
    n = CONTEXT
    assert work(planned("full", whole(n))) == PAIR * n * (n + 1) // 2


def test_full_on_other_group_sizes() -> None:
    step = Step.decoding(999, 1)
    assert stored("full", step, MHA) == {Tier.HBM: 32 * 1000 * 2 * 32 * 128 * 2}
    assert work(planned("full", step, MHA)) == 1000 * 4 * 32 * 128
    assert stored("full", step, WIDE) == {Tier.HBM: 80 * 1000 * 2 * 8 * 128 * 2}
    assert work(planned("full", step, WIDE)) == 1000 * 4 * 64 * 128


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8", "int8", "int4"])
def test_full_stores_what_the_model_shape_says_its_layers_keep(kv_dtype: str) -> None:
    for name in model_names():
        model = replace(load_model(name), kv_dtype=kv_dtype)
        for tokens in (100, 5000):
            assert stored("full", Step.decoding(tokens - 1, 1), model)[Tier.HBM] == model.kv_bytes(tokens), name


def test_full_keeps_the_window_of_a_sliding_layer() -> None:
    model = load_model("gpt-oss-20b")  # windows of 128; 8 KV heads of 64, 64 query heads
    layer = next(i for i, shape in enumerate(model.layers) if shape.kind == "sliding")
    plan = planned("full", Step.decoding(1000, 1), model, layer)
    assert held(plan, "kv") == 128 * 2 * 8 * 64 * 2
    assert work(plan) == 128 * 4 * 64 * 64
    # A chunk of 50 after 1,000 tokens: each of its tokens sees 128, together they reach 128 + 49 back.
    chunk = planned("full", Step(prompt_tokens=2000, past_tokens=1000, new_tokens=50), model, layer)
    assert work(chunk) == 50 * 128 * 4 * 64 * 64
    assert held(chunk, "kv") == 177 * 2 * 8 * 64 * 2


def test_mla_attends_to_the_latent_in_decode_and_to_heads_in_prefill() -> None:
    model = load_model("deepseek-v3")  # latent 512 + 64 rotary; 128 heads of 128 + 64 for keys, 128 for values
    step = Step.decoding(999, 1)
    for text in ("full", "offload-all"):
        assert work(planned(text, step, model)) == 1000 * 2 * 128 * (576 + 512)
        assert work(planned(text, whole(1000), model)) == 500_500 * 2 * 128 * (192 + 128)
    assert held(planned("full", step, model), "kv") == 1000 * 576 * 2
    assert moved(planned("offload-all", step, model)) == {UP: 999 * 576 * 2, DOWN: 576 * 2}


def test_a_linear_layer_keeps_one_state() -> None:
    model = load_model("jamba-1.5-mini")  # 8,192 channels of 16 states and a convolution of 4 - 1 inputs
    layer = next(i for i, shape in enumerate(model.layers) if shape.kind == "linear")
    plan = planned("full", Step.decoding(CONTEXT, 1), model, layer)
    assert held(plan, "state") == 8192 * (16 + 3) * 2
    assert work(plan) == 4 * 8192 * (16 + 3)


def test_offload_all_streams_the_cache_through_two_layers_of_staging() -> None:
    step = Step.decoding(CONTEXT - 1, 1)
    plan = planned("offload-all", step)
    assert stored("offload-all", step) == {Tier.DDR: 16 * GIB, Tier.HBM: 2 * CONTEXT * KV}
    assert moved(plan) == {UP: (CONTEXT - 1) * KV, DOWN: KV}
    assert work(plan) == PAIR * CONTEXT
    everything = planned("offload-all:write_back=all", step)
    assert moved(everything) == {UP: (CONTEXT - 1) * KV, DOWN: CONTEXT * KV}


def test_offload_all_prefill_fetches_only_earlier_chunks() -> None:
    assert moved(planned("offload-all", whole(10_000))) == {DOWN: 10_000 * KV}
    second = planned("offload-all", Step(prompt_tokens=10_000, past_tokens=4000, new_tokens=6000))
    assert moved(second) == {UP: 4000 * KV, DOWN: 6000 * KV}
    assert work(second) == PAIR * (6000 * 4000 + 6000 * 6001 // 2)


def test_sink_window_keeps_sinks_and_window() -> None:
    step = Step.decoding(CONTEXT, 7)
    plan = planned("sink-window:sink_tokens=4,window_tokens=2000", step)
    assert stored("sink-window", step) == {Tier.HBM: 32 * 2004 * KV}
    assert moved(plan) == {}
    assert work(plan, "attend") == PAIR * 2004
    assert work(plan, "rotate") == 3 * 8 * 128 * 2004  # 4 products and 2 sums turn 2 elements
    assert work(planned("sink-window:positions=original", step)) == PAIR * 2004
    # Prefill: 2,004 tokens see all before them, the others 2,004 each.
    assert work(planned("sink-window", whole(10_000)), "attend") == PAIR * (2004 * 2005 // 2 + (10_000 - 2004) * 2004)


def test_snapkv_keeps_its_budget_and_what_it_generates() -> None:
    step = Step.decoding(CONTEXT, 10)
    plan = planned("snapkv", step)
    assert stored("snapkv", step) == {Tier.HBM: 32 * 2058 * KV}
    assert work(plan) == PAIR * 2058
    assert sum(read(plan, "attend").values()) == 2058 * KV + 8192
    # One cache for each of 32 query heads instead of 8 KV heads, and the same arithmetic.
    assert stored("snapkv:per=query_head", step) == {Tier.HBM: 4 * 32 * 2058 * KV}
    assert work(planned("snapkv:per=query_head", step)) == PAIR * 2058
    assert stored("snapkv:per=query_head", step, MHA) == stored("snapkv", step, MHA)


def test_snapkv_prefill_scores_all_keys_with_the_last_queries() -> None:
    n = CONTEXT
    plan = planned("snapkv", whole(n))
    assert work(plan, "observe") == 2 * 32 * 128 * 32 * n  # 2 Hq d w n
    assert work(plan, "attend") == PAIR * n * (n + 1) // 2
    assert held(plan, "scores") == 32 * 32 * n * 4  # Hq w n in fp32
    assert read(plan, "compress") == {"raw_keys": 2048 * KV // 2, "raw_values": 2048 * KV // 2}


def test_snapkv_observes_the_same_queries_however_a_prompt_is_cut() -> None:
    n, row = 10_000, 32 * 128 * 2  # bytes of one token's query over all heads

    def chunk(past: int, new: int) -> LayerPlan:
        return planned("snapkv", Step(prompt_tokens=n, past_tokens=past, new_tokens=new))

    # The window is tokens 9,968 to 9,999. A last chunk of 20 has 20 of them; the chunk before it leaves 12.
    assert read(chunk(9980, 20), "observe") == {"q": 20 * row, "early_q": 12 * row, "raw_keys": n * KV // 2}
    assert read(chunk(8000, 1980), "keep_queries") == {"q": 12 * row}
    assert held(chunk(8000, 1980), "early_q") == held(chunk(9980, 20), "early_q") == 32 * row
    # Several short chunks leave what each has.
    assert read(chunk(9975, 3), "keep_queries") == {"q": 3 * row}
    # Nothing is left where the last chunk holds the whole window, or where the window has not begun.
    for plan in (chunk(9968, 32), chunk(0, n), chunk(0, 9968)):
        assert held(plan, "early_q") == 0
        assert "keep_queries" not in {op.name for op in plan.ops}


def test_quest_reads_bounds_of_all_pages_and_a_budget_of_tokens() -> None:
    step = Step.decoding(CONTEXT - 1, 1)  # 8,192 pages, the last one full
    plan = planned("quest", step)
    assert held(plan, "bounds") == 2 * 8192 * 8 * 128 * 2  # two vectors a page: 1/16 of the KV bytes
    assert stored("quest", step)[Tier.HBM] == 16 * GIB + 30 * GIB // 32 + 32 * 8192 * 4  # 2 dense layers; one ring
    assert read(plan, "score") == {"q": 8192, "bounds": 2 * 8192 * 8 * 128 * 2}
    assert work(plan, "score") == 4 * 32 * 128 * 8192
    assert work(plan, "attend") == PAIR * 2048
    assert sum(read(plan, "attend").values()) == 2048 * KV + 8192
    assert work(planned("quest", step, layer=1)) == PAIR * CONTEXT
    # One token on, the last page has a single token and 127 others are chosen.
    assert work(planned("quest", Step.decoding(CONTEXT, 1)), "attend") == PAIR * (127 * 16 + 1)
    # Each new token is compared with both bounds.
    assert work(planned("quest", whole(1000)), "bound") == 1000 * 2 * 8 * 128


@pytest.mark.parametrize(("model", "group"), [(MHA, 1), (LLAMA, 4), (WIDE, 8)])
def test_quest_per_query_head_reads_what_any_head_of_a_group_chose(model: ModelShape, group: int) -> None:
    step = Step.decoding(CONTEXT - 1, 1)
    plan, shared = planned("quest:per=query_head", step, model), planned("quest", step, model)
    assert work(plan, "attend") == work(shared, "attend")  # every head still attends to its own budget
    added = sum(count.maximum for count in plan.counts)
    assert added == (group - 1) * 127  # all heads but one may choose 127 other pages
    kv_heads = model.layers[5].kv_heads
    at_most = {"added": kv_heads * added}
    row = 128 * 2
    attend = next(op for op in plan.ops if op.name == "attend")
    assert isinstance(attend, Compute)
    rows = next(access.rows for access in attend.reads if access.buffer == "keys")
    assert rows.at(at_most) * row == kv_heads * (16 + group * 127 * 16) * row


def test_infllm_keeps_a_window_and_a_block_cache_and_offloads_the_rest() -> None:
    step = Step.decoding(CONTEXT - 1, 1)
    blocks = (CONTEXT - 4096 - 128) // 128
    assert blocks == 991
    held_bytes = stored("infllm", step)
    ids = 2 * 16 * 8  # one ring: 16 blocks to fetch and their slots
    assert held_bytes[Tier.DDR] - ids == 32 * 991 * 128 * KV
    assert held_bytes[Tier.DDR] / GIB == pytest.approx(15.5, abs=0.05)
    per_layer = 4096 * KV + (128 + 0) * KV + 32 * 128 * KV + 991 * 32 * 128 * 2
    tail = 128 * KV  # a block fills up before it closes
    mass = (4096 + 128) * 32 * 4  # of each token of window and tail, for each query head
    resident = 32 * 2 * 8  # id and stamp of each cached block
    assert held_bytes[Tier.HBM] == 32 * (per_layer + tail + mass + resident) + ids
    assert 32 * 4096 * KV == GIB // 2
    assert 32 * 32 * 128 * KV == GIB // 2


def test_infllm_decode_looks_sixteen_blocks_up() -> None:
    plan = planned("infllm", Step.decoding(CONTEXT, 1))  # 991 blocks closed before, one more token in the tail
    assert work(plan, "score") == 2 * 32 * 128 * 991
    assert work(plan, "attend_near") == PAIR * (4096 + 128 + 1)
    assert work(plan, "attend") == PAIR * 16 * 128
    assert work(plan, "weigh") == 2 * 32 * 128 * 4096  # scores of the window alone
    # 40 % of 16 blocks are missed, rounded to 6; a block has 0.5 MiB; 16 ids and slots of 8 bytes go down.
    assert moved(plan) == {UP: 6 * 2**19, DOWN: 2 * 16 * 8}
    assert plan.counts[0].maximum * 2**19 == 8 * 2**20


def test_infllm_moves_a_block_when_it_leaves_the_window() -> None:
    before, closing = Step.decoding(4096 + 128 + 126, 1), Step.decoding(4096 + 128 + 126, 2)
    assert moved(planned("infllm", before)) == {}
    assert moved(planned("infllm", closing)) == {DOWN: 128 * KV}
    assert work(planned("infllm", closing), "attend") == PAIR * (4096 + 128 + 128)  # still near in this step
    # The token that leaves joins 127 others in the block, so the tail is read and nothing stays in it.
    (append,) = (op for op in planned("infllm", closing).ops if op.name == "append")
    assert isinstance(append, Compute)
    assert [access.rows.fixed for access in append.reads] == [1, 1, 127]  # new, leaving, tail
    assert [access.rows.fixed for access in append.writes] == [1, 0, 1, 1]  # window, rest, mass, closing


@pytest.mark.parametrize(("past", "new"), [(0, 7000), (0, 20_000), (5120, 3000), (512 * 20, 512 * 3 + 17), (8192, 1)])
def test_infllm_prefill_sums_over_execution_blocks(past: int, new: int) -> None:
    near = far = scored = chosen = 0
    for first in range(past, past + new, 512):
        last = min(first + 512, past + new)
        blocks = max(0, first - 4096 - 128) // 128  # closed when the execution block begins
        scored += blocks
        chosen += min(16, blocks)
        far += (last - first) * min(16, blocks) * 128
        near += sum(held - 128 * blocks for held in range(first + 1, last + 1))
    plan = planned("infllm", Step(prompt_tokens=50_000, past_tokens=past, new_tokens=new))
    assert work(plan, "score") == scored * 2 * 32 * 128
    assert work(plan, "attend", "attend_near") == PAIR * (near + far)
    assert sum(count.maximum for count in plan.counts) == chosen


def test_squeezed_centroids_are_a_fortieth_of_the_cache() -> None:
    step = Step.decoding(128_104, 1)  # 128,000 clustered keys, 6,400 centroids
    plan = planned("squeezed-attention", step)
    assert held(plan, "centroids") == 6400 * 8 * 128 * 2 == 128_000 * KV // 40
    assert held(plan, "kv") == (128_104 + 1) * KV
    index = 6400 * 8 * 128 * 2 + 8 * 4 * (128_000 + 6400) + 4  # centroids; labels and sizes; the threshold
    rings = 8 * 4 * (6400 + 128_000)  # of one layer: scores, and indices of as many keys as may pass
    assert stored("squeezed-attention", step) == {Tier.HBM: 32 * (128_105 * KV + index) + rings}


def test_squeezed_decode_looks_up_twice_and_reads_a_tenth() -> None:
    plan = planned("squeezed-attention", Step.decoding(128_104, 1))
    assert work(plan, "score") == 2 * 2 * 32 * 128 * 6400
    assert read(plan, "score")["centroids"] == 2 * 6400 * 8 * 128 * 2
    assert work(plan, "attend") == PAIR * (12_800 + 105)
    attend = next(op for op in plan.ops if op.name == "attend")
    assert isinstance(attend, Compute)  # exact rows lie together, chosen ones where they are
    assert [access.rows.at(expected(plan)) * KV // 8 for access in attend.reads[1:]] == [105 * KV, 12_800 * KV]
    assert moved(plan) == {}


def test_squeezed_with_two_levels_scores_fine_centroids_below_survivors() -> None:
    plan = planned("squeezed-attention:levels=2", Step.decoding(128_104, 1))  # 1,280 coarse ones, 30 % survive
    assert work(plan, "score_coarse") == 2 * 2 * 32 * 128 * 1280
    assert work(plan, "score") == 2 * 2 * 32 * 128 * 1920
    assert held(plan, "coarse_centroids") == 1280 * 2048


def test_squeezed_from_host_memory_gathers_the_chosen_rows() -> None:
    step = Step.decoding(128_104, 1)
    plan = planned("squeezed-attention:tier=ddr", step)
    assert stored("squeezed-attention:tier=ddr", step)[Tier.DDR] == 32 * 128_000 * KV
    assert held(plan, "exact") == (4 + 100 + 1) * KV
    assert held(plan, "staged") == 2 * 12_800 * KV  # what passes beyond twice the share comes in further waves
    assert held(planned("squeezed-attention:tier=ddr,budget_tokens=512", step), "staged") == 512 * KV
    assert moved(plan) == {UP: 12_800 * KV}
    assert moved(planned("squeezed-attention:tier=ddr,budget_tokens=512", step)) == {UP: 512 * KV}
    assert moved(planned("squeezed-attention:tier=ddr", whole(128_104))) == {DOWN: 128_000 * KV}


def test_squeezed_prefill_clusters_each_head_and_pools_all_layers() -> None:
    plan = planned("squeezed-attention:kmeans_iterations=10", whole(128_104))
    assert work(plan, "cluster") == 10 * 2 * 128_000 * 6400 * 128 * 8  # 2 n K d iterations per KV head
    assert work(plan, "calibrate") == 100 * 2 * 32 * 128 * 6400
    (threshold,) = plan_end(parse_policy("squeezed-attention"), LLAMA, whole(128_104))
    assert isinstance(threshold, Compute)
    assert threshold.rows.fixed == 32 * 8 * 6400  # the keys of a cluster share its score
    assert plan_end(parse_policy("squeezed-attention:budget_tokens=64"), LLAMA, whole(128_104)) == ()


def test_squeezed_keeps_a_budget_without_a_threshold() -> None:
    for levels, queries in ((1, 0), (2, 100 * 1280)):  # on two levels the coarse one has its threshold still
        text = f"squeezed-attention:budget_tokens=64,levels={levels}"
        plan = planned(text, whole(128_104))
        assert work(plan, "calibrate") == queries * 2 * 32 * 128
        assert held(plan, "thresholds") == 4 * (levels - 1)
        assert held(plan, "calibrated") == 8 * 1280 * 4 * (levels - 1)
        rows = [op.rows.fixed for op in plan_end(parse_policy(text), LLAMA, whole(128_104)) if isinstance(op, Compute)]
        assert rows == [32 * 8 * 1280] * (levels - 1)


def test_squeezed_holds_the_queries_that_calibrate_when_a_prompt_comes_in_chunks() -> None:
    last = Step(prompt_tokens=128_104, past_tokens=128_044, new_tokens=60)
    plan = planned("squeezed-attention", last)
    assert held(plan, "observed") == 100 * 32 * 128 * 2  # 40 of the last 100 queries came with an earlier chunk
    assert work(plan, "calibrate") == 100 * 2 * 32 * 128 * 6400
    index = held(plan, "centroids", "labels", "sizes", "thresholds", "calibrated", "observed")
    rings = 8 * 4 * (6400 + 128_000)
    assert stored("squeezed-attention", last) == {Tier.HBM: 32 * (128_104 * KV + index) + rings}
    # From host memory: the raw prompt of all layers beside what it leaves in HBM.
    exact, staged = 104 * KV, 2 * 12_800 * KV
    held_bytes = stored("squeezed-attention:tier=ddr", last)
    assert held_bytes[Tier.HBM] == 32 * ((128_104 * KV) + exact + index) + rings + staged
    one_by_one = stored("squeezed-attention:tier=ddr", whole(128_104))  # one layer's prompt at a time, no queries kept
    assert one_by_one[Tier.HBM] == held_bytes[Tier.HBM] - 31 * 128_104 * KV - 32 * held(plan, "observed")


def test_shadowkv_at_122k_fits_six_times_as_often() -> None:
    step = Step.decoding(122 * 1024, 1)
    # 15,616 chunks, less 4 local ones, down to a multiple of 8: 15,608; the tail is 124,928 - 124,864 = 64 tokens.
    # Exact are 24 outliers for each 1,024 tokens of budget, and the 2 chunks that four sinks can lie on.
    plan = planned("shadowkv", step)
    low_rank = 124_928 * 160 * 2 + 8 * 160 * 128 * 2
    landmarks = (15_608 - 50) * 8 * 128 * 2
    exact = (50 * 8 + 64 + 1) * KV
    slots = 2048 * KV
    ids = 8 * 8 * 15_608 + 8 * 8 * 256  # int64 for each chunk, outliers included, and for each slot
    assert held(plan, "u", "sv") == low_rank
    assert held(plan, "landmarks") == landmarks
    assert held(plan, "k_exact", "v_exact") == exact
    assert held(plan, "k_slots", "v_slots") == slots
    scores = (32 + 8) * (15_608 - 50) * 4  # one layer's
    total = stored("shadowkv", step)
    assert total[Tier.HBM] == 32 * (low_rank + landmarks + exact + slots + ids) + scores
    assert total[Tier.DDR] == 32 * 15_608 * 8 * 2048
    # The authors' code: 2.47 GiB without ids, with room for 128 generated tokens; 7.6 GiB of values on the host.
    assert (total[Tier.HBM] - 32 * ids - scores + 32 * 127 * KV) / GIB == pytest.approx(2.47, abs=0.01)
    assert total[Tier.DDR] / GIB == pytest.approx(7.6, abs=0.05)
    assert stored("full", step)[Tier.HBM] / total[Tier.HBM] > 6


def test_shadowkv_decode_fetches_values_and_rebuilds_keys_of_missed_chunks() -> None:
    plan = planned("shadowkv", Step.decoding(122 * 1024, 1))
    # 60 % of 256 chunks are hits, so 102 miss in each of 8 heads; a chunk is 8 rows of 256 bytes.
    assert moved(plan) == {UP: 102 * 8 * 8 * 256} == {UP: 1_671_168}
    assert work(plan, "rebuild") == 102 * 8 * 8 * (2 * 160 * 128 + 3 * 128)
    assert work(plan, "score") == 2 * 32 * 128 * 15_558
    assert read(plan, "score")["landmarks"] == 15_558 * 2048
    assert work(plan, "attend") == PAIR * (400 + 64 + 1 + 2048)
    assert plan.counts[0].maximum * 8 * 8 * 256 == 4 * 2**20  # no hit: 4 MiB a layer


def test_shadowkv_prefill_decomposes_all_heads_together_and_offloads_values() -> None:
    plan = planned("shadowkv", whole(122 * 1024))
    assert work(plan, "decompose") == 4 * 124_928 * 1024**2  # 4 n (Hkv d)^2
    assert moved(plan) == {DOWN: 124_864 * 2048}
    wide = planned("shadowkv", whole(122 * 1024), MHA)
    assert work(wide, "decompose") == 4 * 124_928 * 4096**2
    assert held(planned("shadowkv:rank=5000", Step.decoding(9000, 1)), "u") == 9000 * 1024 * 2  # rank is at most Hkv d


def test_retrieval_attention_keeps_keys_in_fp32_beside_values_on_the_host() -> None:
    step = Step.decoding(CONTEXT, 1)
    plan = planned("retrieval-attention:index=flat", step)
    assert held(plan, "index_keys") == (CONTEXT - 640) * 8 * 128 * 4
    assert held(plan, "index_values") == (CONTEXT - 640) * 2048
    assert stored("retrieval-attention:index=flat", step)[Tier.DDR] / GIB == pytest.approx(24, abs=0.2)
    assert held(plan, "k_near", "v_near") == 641 * KV
    assert stored("retrieval-attention", step)[Tier.HBM] / 2**20 == pytest.approx(80, abs=0.5)
    graph = planned("retrieval-attention", step)
    assert held(graph, "graph") == (CONTEXT - 640) * 8 * 16 * 4  # 16 links of 4 bytes; a graph for each KV head
    assert held(graph, "entries") == 8 * 32 * 4
    ivf = planned("retrieval-attention:index=ivf", step)
    assert held(ivf, "list_centroids") == 8 * 512 * 128 * 4
    assert held(ivf, "list_ids") == (CONTEXT - 640) * 8 * 4
    assert held(ivf, "list_starts") == 8 * 513 * 4  # and the end of the last list
    assert all(held(each, "padding_host") == 4 for each in (plan, graph, ivf))


def test_retrieval_attention_moves_a_query_down_and_a_partial_output_up() -> None:
    for model, heads in ((LLAMA, 32), (WIDE, 64)):
        for index in ("graph", "ivf", "flat"):
            plan = planned(f"retrieval-attention:index={index}", Step.decoding(CONTEXT, 1), model)
            assert moved(plan) == {DOWN: heads * 128 * 2, UP: heads * (128 + 1) * 4}
    assert moved(planned("retrieval-attention", Step.decoding(CONTEXT, 1))) == {DOWN: 8192, UP: 16_512}


def test_retrieval_attention_searches_on_the_cpu() -> None:
    keys = CONTEXT - 640
    step = Step.decoding(CONTEXT, 1)
    flat = planned("retrieval-attention:index=flat", step)
    assert work(flat, "search") == 2 * 32 * 128 * keys
    assert read(flat, "search")["index_keys"] == keys * 8 * 128 * 4
    each = planned("retrieval-attention:index=flat,scan_per=query_head", step)
    assert read(each, "search")["index_keys"] == 4 * keys * 8 * 128 * 4
    ivf = planned("retrieval-attention:index=ivf", step)
    assert work(ivf, "search") == 2 * 32 * 128 * (39_130 + 512)  # 30 % of 130,432 keys and all centroids
    graph = planned("retrieval-attention", step)
    assert work(graph, "search") == 2 * 128 * 8 * round(0.02 * 4 * keys)
    # For each four keys that a group's query heads visit, one whose 16 links of 4 bytes are read.
    assert read(graph, "search")["graph"] == 8 * round(0.005 * 4 * keys) * 16 * 4
    # Five keys for each of 5,000 that are returned are more than 2 %: 25,000; or just those 5,000.
    assert read(planned("retrieval-attention:top_k=5000", step), "search")["graph"] == 32 * 6250 * 16 * 4
    least = planned("retrieval-attention:top_k=5000,scan_factor=1", step)
    assert read(least, "search")["graph"] == 32 * 1250 * 16 * 4
    for plan in (flat, ivf, graph):
        assert work(plan, "attend_near") == PAIR * 641
        assert work(plan, "attend_far") == 2 * 32 * 128 * 100  # the search has left the scores


def test_retrieval_attention_builds_its_index_from_the_prompt() -> None:
    n, keys = CONTEXT, CONTEXT - 640
    # A key in fp32, a value in bf16, for 8 heads of 128; and how many tokens are padding, an int32.
    down = keys * (4096 + 2048) + 4
    assert moved(planned("retrieval-attention:index=flat", whole(n))) == {DOWN: down}
    ivf = planned("retrieval-attention:index=ivf", whole(n))
    assert moved(ivf) == {DOWN: down}
    assert work(ivf, "build") == 10 * 2 * keys * 512 * 128 * 8
    assert read(ivf, "build")["index_keys"] == 11 * keys * 4096  # ten rounds, and once to change places
    graph = planned("retrieval-attention", whole(n))
    # Of each KV head: products of every key with 8,192 queries, and with every key by inner product and by distance.
    assert work(graph, "build") == 8 * keys * (8192 + 2 * keys) * 2 * 128
    assert work(planned("retrieval-attention", whole(1500)), "build") == 8 * 860 * (4 * 1500 + 2 * 860) * 2 * 128
    assert moved(graph) == {DOWN: down + 8 * keys * 16 * 4 + 8 * 32 * 4}  # links and entry points
    chunk = planned("retrieval-attention", Step(prompt_tokens=n, past_tokens=4096, new_tokens=4096))
    assert held(chunk, "queries") == 8192 * 8192  # the queries of all chunks wait for the last one
