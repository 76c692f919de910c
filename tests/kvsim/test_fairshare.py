"""Max-min fair sharing against closed forms and against an independent definition."""

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.hardware.fairshare import FairShare, max_min_rates


def test_equal_flows_share_equally():
    assert max_min_rates([100.0] * 4, [{"link": 1.0}] * 4, {"link": 10.0}) == pytest.approx([2.5] * 4)


def test_what_a_slow_flow_leaves_goes_to_the_others():
    rates = max_min_rates([1.0, 100.0, 100.0], [{"link": 1.0}] * 3, {"link": 11.0})
    assert rates == pytest.approx([1.0, 5.0, 5.0])


def test_a_chain_of_bottlenecks():
    """Two flows on a narrow link, one of them also on a wide one, where a third takes the rest."""
    uses = [{"narrow": 1.0}, {"narrow": 1.0, "wide": 1.0}, {"wide": 1.0}]
    assert max_min_rates([99.0] * 3, uses, {"narrow": 2.0, "wide": 10.0}) == pytest.approx([1.0, 1.0, 9.0])


def test_a_weighted_flow_takes_more_of_the_link_at_the_same_rate():
    assert max_min_rates([9.0, 9.0], [{"ddr": 3.0}, {"ddr": 1.0}], {"ddr": 8.0}) == pytest.approx([2.0, 2.0])


@given(
    flows=st.lists(
        st.tuples(
            st.floats(0.1, 50),
            st.dictionaries(st.sampled_from("abcd"), st.floats(0.5, 4), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=8,
    ),
    capacities=st.fixed_dictionaries({r: st.floats(1, 40) for r in "abcd"}),
)
def test_max_min_by_its_definition(flows, capacities):
    """Feasible, and every flow is at its cap or crosses a full resource on which no flow has a higher rate."""
    caps, uses = [c for c, _ in flows], [u for _, u in flows]
    rates = max_min_rates(caps, uses, capacities)
    load = {r: sum(x * u.get(r, 0.0) for x, u in zip(rates, uses, strict=True)) for r in capacities}
    for resource, used in load.items():
        assert used <= capacities[resource] * (1 + 1e-9)
    for rate, cap, use in zip(rates, caps, uses, strict=True):
        bottlenecks = [r for r in use if load[r] >= capacities[r] * (1 - 1e-9)]
        tops = [max(x for x, u in zip(rates, uses, strict=True) if r in u) for r in bottlenecks]
        assert rate >= cap * (1 - 1e-9) or any(rate >= top * (1 - 1e-9) for top in tops)


STEP = 1 / 512


def filled(caps, uses, capacities):
    """Progressive filling as it is told: all rates rise together by small steps, each until something stops it."""
    rates, load, rising = [0.0] * len(caps), dict.fromkeys(capacities, 0.0), set(range(len(caps)))
    while rising:
        for i in sorted(rising):
            more = {r: load[r] + STEP * share for r, share in uses[i].items()}
            if rates[i] + STEP > caps[i] or any(more[r] > capacities[r] for r in more):
                rising.remove(i)
                continue
            rates[i] += STEP
            load.update(more)
    return rates


@settings(max_examples=40)
@given(
    flows=st.lists(st.tuples(st.floats(0.5, 8), st.sets(st.sampled_from("abc"), min_size=1)), min_size=1, max_size=5),
    capacities=st.fixed_dictionaries({r: st.floats(1, 8) for r in "abc"}),
)
def test_max_min_is_progressive_filling(flows, capacities):
    """What one flow loses to a step the flows beside it can gain, so each bottleneck may add as many steps as flows."""
    caps, uses = [c for c, _ in flows], [dict.fromkeys(sorted(rs), 1.0) for _, rs in flows]
    expected = filled(caps, uses, capacities)
    assert max_min_rates(caps, uses, capacities) == pytest.approx(expected, abs=3 * len(flows) * STEP)


@given(n=st.integers(1, 12), capacity=st.floats(1, 100))
def test_n_equal_flows_end_together(n, capacity):
    """n flows of 1 on one link take n / capacity, whatever they could do alone."""
    assert finish_times(capacity, [(0.0, 1.0, 1e6)] * n) == pytest.approx([n / capacity] * n)


def finish_times(capacity, flows):
    """(start, amount, cap) flows on one link: when each ends."""
    env = simpy.Environment()
    link, ends = FairShare(env, {"link": capacity}), []

    def one(start, amount, cap, index):
        yield env.timeout(start)
        yield link.flow(amount, cap, {"link": 1.0})
        ends[index] = env.now

    for index, (start, amount, cap) in enumerate(flows):
        ends.append(None)
        env.process(one(start, amount, cap, index))
    env.run()
    return ends


def test_fluid_times_by_hand():
    """10 units alone for 0.5 s at 10/s leave 5; shared at 5/s both move 5 by 1.5 s; the second has 1 left at 10/s."""
    assert finish_times(10.0, [(0.0, 10.0, 99.0), (0.5, 6.0, 99.0)]) == pytest.approx([1.5, 1.6])


@given(
    flows=st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 20), st.floats(0.5, 20)), min_size=1, max_size=6),
    capacity=st.floats(1, 10),
)
def test_nothing_beats_the_link_or_the_cap(flows, capacity):
    ends = finish_times(capacity, flows)
    for end, (start, amount, cap) in zip(ends, flows, strict=True):
        assert end - start >= amount / min(cap, capacity) * (1 - 1e-9)
    assert max(ends) - min(s for s, _, _ in flows) >= sum(a for _, a, _ in flows) / capacity * (1 - 1e-9)


def test_nothing_to_move_takes_no_time_and_unknown_resources_are_named():
    env = simpy.Environment()
    link = FairShare(env, {"link": 1.0})
    assert link.flow(0.0, 1.0, {"link": 1.0}).triggered
    with pytest.raises(ValueError, match="unknown resource"):
        link.flow(1.0, 1.0, {"nolink": 1.0})
