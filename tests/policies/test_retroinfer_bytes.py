"""RetroInfer's bytes and FLOPs by hand, and where it is exact.

Llama-3.1-8B: 32 layers, 32 query heads over 8 KV heads of 128 in bf16: a key or a value of all KV heads has 2,048
bytes, a token 4,096 per layer, and a query-key pair costs 16,384 FLOPs.
"""

from collections import Counter
from math import lcm

import pytest

from kvsim.models import load_model
from policies import LayerPlan, Step, parse_policy, plan_layer
from policies.plan import Compute, Sync, Tier, Work, flops, moved_bytes, stored_bytes
from policies.retroinfer_index import cluster_counts

LLAMA = load_model("llama-3.1-8b")
GIB = 2**30
CONTEXT = 131_072
KEY, KV, PAIR = 2048, 4096, 16384
UP, DOWN = (Tier.DDR, Tier.HBM), (Tier.HBM, Tier.DDR)
SLOTS = 3 * 147 * 4  # 147 clusters are retrieved at 128K; 16 tokens are four blocks


def planned(text: str, step: Step) -> LayerPlan:
    return plan_layer(parse_policy(text), LLAMA, step, 5)


def expected(plan: LayerPlan) -> dict[str, int]:
    return {count.name: count.expected() for count in plan.counts}


def moved(plan: LayerPlan, **totals: int) -> Counter[tuple[Tier, Tier]]:
    return moved_bytes(plan.ops, plan.buffers, expected(plan) | totals)


def work(plan: LayerPlan, *names: str, **totals: int) -> int:
    return flops(tuple(op for op in plan.ops if op.name in names), expected(plan) | totals)


def held(plan: LayerPlan, *names: str) -> int:
    return sum(buffer.nbytes for buffer in plan.buffers if buffer.name in names)


@pytest.mark.parametrize(
    ("prompt", "clusters"),
    [
        (120_000, 7440),  # 15 segments, multiples of 120: 7,500 is 62.5 of them, and of two alike the lower is taken
        (131_072, 8192),  # 16 segments
        (1_024_000, 64_000),  # 125 segments, multiples of 1,000
        (1092, 72),  # one segment; 68.25 is 3.75 below 72 and 4.25 above 64
    ],
)
def test_it_has_the_authors_number_of_clusters(prompt: int, clusters: int) -> None:
    assert cluster_counts(prompt, 16, 8192)[0] == clusters


def test_clusters_are_the_nearest_multiple() -> None:
    for prompt in range(1092, 200_000, 777):
        segments = max(1, int(prompt / 8192 + 0.5))
        unit = lcm(8, segments)
        multiples = range(unit, prompt // 16 + 2 * unit, unit)
        nearest = min(multiples, key=lambda multiple: (abs(16 * multiple - prompt), multiple))
        assert cluster_counts(prompt, 16, 8192) == (nearest, nearest // segments), prompt


def test_decode() -> None:
    plan = planned("retroinfer", Step.decoding(CONTEXT, 1))
    # 8,192 clusters: 147 retrieved (1.8 % is 147.5), 1,901 estimated (23.2 % is 1,900.5).
    assert held(plan, "centroids") == held(plan, "value_sums") == 8192 * KEY
    assert held(plan, "starts") == held(plan, "sizes") == 8 * 8192 * 4
    assert held(plan, "cached") == 3 * 147 * 16 * KV
    assert held(plan, "resident") == 8 * SLOTS * 8
    assert held(plan, "clusters") == (CONTEXT - 68 + 3) * KV
    assert held(plan, "k_exact", "v_exact") == (68 + 1) * KV
    assert work(plan, "score") == 2 * 32 * 128 * 8192
    assert work(plan, "estimate") == PAIR * 1901
    # A cluster of 16 tokens is four blocks, and half of a fifth where it ends within one: 4.375 on average, 643 of 147.
    blocks = round(147 * 4.375)
    assert expected(plan)["read"] == 8 * blocks
    assert work(plan, "attend") == PAIR * (69 + 4 * blocks)
    assert work(plan, "attend", read=0) == PAIR * 69
    # Without a single hit every block that is read crosses PCIe; 512 bytes a token and KV head, and nothing goes down.
    assert moved(plan, miss=8 * blocks) == {UP: 8 * blocks * 4 * 512}
    # 15 % are missed.
    assert moved(plan)[UP] == 8 * round(0.15 * 147 * 4.375) * 4 * 512
    assert not [op for op in plan.ops if isinstance(op, Sync)]


def test_a_run_that_crosses_the_bus_has_two_kib() -> None:
    plan = planned("retroinfer", Step.decoding(CONTEXT, 1))
    assert {buffer.row_bytes for buffer in plan.buffers if buffer.name in ("blocks", "cached")} == {2048}


def test_at_128k_in_all_layers() -> None:
    kept = stored_bytes([planned("retroinfer", Step.decoding(CONTEXT, 1)).buffers] * 32)
    index = 32 * (2 * 8192 * KEY + 2 * 8 * 8192 * 4)
    cache = 32 * (3 * 147 * 16 * KV + 8 * SLOTS * 8)
    assert index / GIB == pytest.approx(1.0, abs=0.02)
    assert cache / GIB == pytest.approx(0.86, abs=0.01)
    shared = 8192 * (32 + 8) * 4 + 8 * SLOTS * 3 * 4 + 32 * 129 * 4  # scores, what was chosen, what is estimated
    assert kept[Tier.HBM] == index + cache + 32 * 69 * KV + shared
    assert kept[Tier.DDR] == 32 * (CONTEXT - 68 + 3) * KV


def test_build() -> None:
    n = 120_000
    plan = planned("retroinfer", Step(prompt_tokens=n, past_tokens=0, new_tokens=n))
    far = n - 68
    # Nine rounds over the 496 clusters of a segment of 8,000, one over all 7,440; a product is 2 * 128 FLOPs.
    assert work(plan, "cluster") == 8 * far * 9 * 496 * 256
    assert work(plan, "assign") == 8 * far * 7440 * 256
    assert 32 * work(plan, "cluster", "assign") == pytest.approx(9.4e13, rel=0.04)
    products = [op for op in plan.ops if isinstance(op, Compute) and op.name in ("cluster", "assign")]
    assert {op.work for op in products} == {Work.NEAREST}
    assert moved(plan) == {DOWN: far * KV}
    assert held(plan, "arranged") == far * KV


def test_generated_tokens_are_clustered_every_1024() -> None:
    before, due, after = (planned("retroinfer", Step.decoding(CONTEXT, t)) for t in (1023, 1024, 1025))
    assert [moved(plan)[DOWN] for plan in (before, due, after)] == [0, 1024 * KV, 0]
    assert work(due, "cluster", "assign") == 8 * 1024 * 64 * 10 * 256  # 64 clusters, ten rounds
    assert [held(plan, "centroids") for plan in (before, due, after)] == [8192 * KEY, 8256 * KEY, 8256 * KEY]
    assert [held(plan, "clusters") for plan in (before, due)] == [(CONTEXT - 65) * KV, (CONTEXT - 65 + 1024) * KV]
    # The ring of exact rows keeps its size, and is filled again from where the oldest was.
    assert [held(plan, "k_exact") // KEY for plan in (before, due, after)] == [68 + 1023, 68 + 1024, 68 + 1024]
    assert [held(plan, "leaving") for plan in (before, due, after)] == [0, 1024 * KV, 1024 * KV]
    # One cluster more is retrieved and 15 more are estimated.
    assert work(due, "attend", read=0) == PAIR * (68 + 1024)
    assert work(after, "attend", read=0) == PAIR * 69
    assert [plan.counts[0].maximum for plan in (due, after)] == [SLOTS, 3 * 148 * 4]
    assert work(after, "estimate") == PAIR * 1916


@pytest.mark.parametrize("generated", [1, 500, 1024, 1025, 3000])
def test_buffers_never_shrink_while_decoding(generated: int) -> None:
    """The runtime allocates for the last step; every step before must find its rows there."""
    last = {b.name: b for b in planned("retroinfer", Step.decoding(9000, 3000)).buffers if not b.view}
    for buffer in planned("retroinfer", Step.decoding(9000, generated)).buffers:
        if not buffer.view:
            assert buffer.nbytes <= last[buffer.name].nbytes, buffer.name


def test_what_retrieves_every_cluster_attends_to_everything() -> None:
    # 3,008 tokens less 64 near ones are 184 clusters of 16, and 184 is what the rule gives.
    plan = planned("retroinfer:window_tokens=60,retrieval=1,estimation=0", Step.decoding(3008, 1))
    assert "estimate" not in [op.name for op in plan.ops]
    full_blocks = 8 * 184 * 4  # where every cluster has 16 tokens
    assert work(plan, "attend", read=full_blocks) == PAIR * 3009
    reads = next(op for op in plan.ops if op.name == "attend").reads  # type: ignore[union-attr]
    sizes = {buffer.name: buffer.row_bytes for buffer in plan.buffers}
    read = [a for a in reads if a.buffer in ("k_exact", "v_exact", "cached")]
    assert sum(a.rows.at({"read": full_blocks}) * sizes[a.buffer] for a in read) == KV * 3009


def test_the_share_that_is_read_follows_the_sizes_of_clusters_and_blocks() -> None:
    for text, share in (("block_tokens=1", 16 / 48), ("block_tokens=16", 23.5 / 48), ("cluster_tokens=8", 9.5 / 24)):
        read, miss = planned(f"retroinfer:{text}", Step.decoding(CONTEXT, 1)).counts
        assert (read.share, miss.share) == (pytest.approx(share), pytest.approx(0.15 * share))
