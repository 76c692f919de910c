"""The vocabulary of plans: steps, rows, counts, sums of bytes, and the rules that a plan must keep."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.dense import causal_pairs, windowed_pairs
from policies.plan import (
    Access,
    Buffer,
    Compute,
    Copy,
    Count,
    Op,
    Processor,
    Rows,
    Step,
    Sync,
    Tier,
    Work,
    flops,
    moved_bytes,
    part_of,
    stored_bytes,
)
from policies.plan_rules import check_plan

BUFFERS = (
    Buffer("near", Tier.HBM, 10, (4, 8)),
    Buffer("far", Tier.DDR, 20, (4, 8)),
    Buffer("ids", Tier.HBM, 1, (5,), "int32"),
    Buffer("narrow", Tier.HBM, 20, (4,)),
)
COUNT = Count(name="miss", heads=2, maximum=5, share=0.4, spread=0.1, source="by hand")
SELECT = Compute(name="select", work=Work.TOPK, rows=Rows(7), after=("qkv",), draws=("miss",))
FETCH = Copy(name="fetch", src="far", dst="near", rows=Rows(3, (("miss", 2),)), ids=("ids",), after=("select",))
ATTEND = Compute(
    name="attend",
    work=Work.ATTENTION,
    rows=Rows(10, (("miss", -1),)),
    flops_per_row=6,
    reads=(Access("near", Rows(10)),),
    after=("fetch", "attend@-1"),
)
PLAN: tuple[Op, ...] = (SELECT, Sync(name="wait", after=("select",)), FETCH, ATTEND)


def test_steps_of_a_prompt_and_of_its_answer() -> None:
    first = Step(prompt_tokens=100, past_tokens=0, new_tokens=60)
    last = Step(prompt_tokens=100, past_tokens=60, new_tokens=40)
    whole = Step(prompt_tokens=100, past_tokens=0, new_tokens=100)
    answer = Step.decoding(100, 3)  # two output tokens are held, the third is fed back
    recomputed = Step(prompt_tokens=100, past_tokens=0, new_tokens=107)
    assert [s.prefilling for s in (first, last, whole, answer, recomputed)] == [True, True, True, False, True]
    assert [s.last_chunk for s in (first, last, whole, answer, recomputed)] == [False, True, True, False, True]
    assert [s.whole_prompt for s in (first, last, whole, answer, recomputed)] == [False, False, True, False, True]
    assert [s.tokens for s in (first, last, whole, answer, recomputed)] == [60, 100, 100, 103, 107]
    assert [s.generated_tokens for s in (first, last, whole, answer, recomputed)] == [0, 0, 0, 3, 7]


@given(past=st.integers(0, 60), new=st.integers(1, 60), window=st.integers(1, 80))
def test_pairs_are_those_of_a_mask(past: int, new: int, window: int) -> None:
    queries = range(past, past + new)
    assert causal_pairs(past, new) == sum(key <= query for query in queries for key in range(past + new))
    assert windowed_pairs(past, new, window) == sum(
        query - window < key <= query for query in queries for key in range(past + new)
    )


@given(rows=st.integers(0, 10**7), share=st.decimals(0, 1, places=4))
def test_part_of_rounds_the_decimal_share_half_up(rows: int, share: Any) -> None:
    exact = Fraction(share) * rows
    part = part_of(rows, float(share))
    assert Fraction(-1, 2) < part - exact <= Fraction(1, 2)


def test_part_of_takes_the_decimal_that_is_written() -> None:
    assert part_of(1000, 0.1) == 100
    assert part_of(25, 0.1) == 3  # 2.5, halves up; the binary 0.1 is a little more than a tenth
    assert part_of(15, 0.3) == 5  # 4.5, halves up; the binary 0.3 is a little less than three tenths
    assert part_of(10**15, 1e-05) == 10**10


def test_an_expected_count_rounds_each_head_and_takes_another_share() -> None:
    assert Count(name="miss", heads=8, maximum=256, share=0.4, spread=0.1, source="").expected() == 8 * 102
    assert COUNT.expected(1.0) == 10
    assert COUNT.expected(0.0) == 0


def test_rows_weigh_counts() -> None:
    assert Rows(10, (("miss", -1), ("hit", 3))).at({"miss": 4, "hit": 2}) == 12
    with pytest.raises(KeyError, match="hit"):
        Rows(0, (("hit", 1),)).at({"miss": 4})


def test_bytes_derive_from_rows_shape_and_type() -> None:
    assert BUFFERS[0].row_bytes == 64
    assert BUFFERS[0].nbytes == 640
    assert Buffer("keys", Tier.HBM, 3, (2, 128), "int8").nbytes == 3 * 2 * (128 + 2)
    assert moved_bytes(PLAN, BUFFERS, {"miss": 4}) == {(Tier.DDR, Tier.HBM): (3 + 8) * 64}
    assert flops(PLAN, {"miss": 4}) == 6 * 6


def test_stored_bytes_count_a_ring_once_and_a_view_never() -> None:
    def layer(staged: int) -> list[Buffer]:
        return [
            Buffer("cache", Tier.DDR, 10, (32,)),
            Buffer("staging", Tier.HBM, staged, (32,), ring=2),
            Buffer("q", Tier.HBM, 1, (1024,), ring=1, view=True),
        ]

    held = stored_bytes([layer(5), layer(9), layer(7)])
    assert held == {Tier.DDR: 3 * 640, Tier.HBM: 2 * 9 * 64}


def test_a_lawful_plan_passes() -> None:
    check_plan(PLAN, BUFFERS, (COUNT,))


def changed(op_name: str, **changes: Any) -> tuple[Op, ...]:
    """The lawful plan with one operation changed."""
    assert op_name in {op.name for op in PLAN}
    return tuple(replace(op, **changes) if op.name == op_name else op for op in PLAN)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (changed("wait", name="select"), "operation 'select' occurs twice; names are unique within a layer"),
        (changed("wait", name="mlp"), "operation 'mlp' occurs twice"),
        (changed("fetch", after=("attend",)), "fetch: after 'attend' names no earlier operation of this layer"),
        (changed("fetch", after=("fetch",)), "fetch: after 'fetch' names no earlier operation"),
        (changed("fetch", after=("mlp",)), "fetch: after 'mlp' names no earlier operation"),
        (changed("fetch", after=("rebuild@-1",)), "fetch: after 'rebuild@-1' names no earlier operation"),
        (changed("fetch", after=("attend@1",)), "fetch: after 'attend@1' must be an earlier layer's operation"),
        (changed("fetch", after=("attend@-0",)), "fetch: after 'attend@-0' must be an earlier layer's operation"),
        (changed("fetch", after=("attend@",)), "fetch: after 'attend@' must be an earlier layer's operation"),
        (changed("fetch", src="fra"), "fetch: unknown buffer 'fra'"),
        (changed("fetch", ids=("slots",)), "fetch: unknown buffer 'slots'"),
        (changed("fetch", dst="narrow"), "fetch: a row of 'far' has 64 bytes, of 'narrow' 8"),
        (changed("fetch", src="near"), "fetch: 'near' and 'near' are both in hbm; work within a tier is a Compute"),
        (changed("fetch", rows=Rows(11)), "fetch: copies 11 rows, but 'near' has 10"),
        (changed("attend", reads=(Access("nowhere", Rows(1)),)), "attend: unknown buffer 'nowhere'"),
        (changed("attend", reads=(Access("far", Rows(1)),)), "attend: sm cannot reach 'far' in ddr; copy it first"),
        (changed("attend", processor=Processor.CPU), "attend: cpu cannot reach 'near' in hbm; copy it first"),
        (changed("attend", writes=(Access("far", Rows(1)),)), "attend: sm cannot reach 'far' in ddr"),
        (changed("select", draws=("hit",)), r"select: draws \['hit'\], which the policy does not declare"),
        (changed("attend", draws=("miss",)), r"attend: draws \['miss'\], which an earlier operation has drawn"),
        (changed("select", draws=()), r"fetch: uses counts \['miss'\] before any operation draws them"),
        (
            changed("select", reads=(Access("ids", Rows(0, (("hit", 1),))),)),
            r"select: uses counts \['hit'\] before any operation draws them",
        ),
        (PLAN[:-1], "the plan has no operation 'attend'; the model's mlp waits for it"),
        ((replace(ATTEND, rows=Rows(10), after=()),), r"counts \['miss'\] are declared, but no operation draws them"),
    ],
)
def test_each_broken_rule_is_named(plan: tuple[Op, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_plan(plan, BUFFERS, (COUNT,))


def test_buffers_have_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="two buffers share a name"):
        check_plan(PLAN, (*BUFFERS, BUFFERS[0]), (COUNT,))


def test_an_operation_may_use_what_it_draws_itself() -> None:
    select = replace(SELECT, writes=(Access("ids", Rows(0, (("miss", 1),))),))
    check_plan((select, *PLAN[1:]), BUFFERS, (COUNT,))
