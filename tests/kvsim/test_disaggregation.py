"""Prompts on some replicas, decoding on others: the timeline of a lone request by hand, bytes, memory, waiting."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import GPU, HOST, MODEL, random_trace, setup, trace

from kvsim.hardware.machine import Machine
from kvsim.iteration.clock import Clock, Load
from kvsim.plans.derive import PlanTable
from kvsim.plans.sent_state import SentState
from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate
from kvsim.scenario.tenants import Tenant
from policies import POLICIES, Step, parse_policy, plan_layer
from policies.plan import Tier

TOKEN_BYTES = 131072  # Llama-3.1-8B, bf16
SMALL = replace(MODEL, name="small", layers=MODEL.layers[:3])
SMALL_TOKEN_BYTES = 2 * 2 * 8 * 128 * 3
LONELY = replace(HOST, gpus_max=1, gpus_per_switch=1)  # each GPU in a host of its own, behind one adapter's share


def with_peers(nvlink_Bps, latency_s=1e-5):
    return replace(GPU, rates=replace(GPU.rates, nvlink_Bps=nvlink_Bps, nvlink_latency_s=latency_s))


def chunk_s(policy, prompt, past, new):
    """Duration of an iteration that does nothing but this chunk."""
    machine = Machine(gpu=GPU, host=HOST)
    load = Load(*PlanTable(parse_policy(policy), MODEL, machine, {}).prefill(prompt, past, new))
    return Clock(MODEL, machine).iteration([load], new, int(past + new == prompt))[0]


HEAD_S = Clock(MODEL, Machine(gpu=GPU, host=HOST)).head_s(1)  # after all layers of a prompt's last chunk


def tail_s(all_s, prefill_s, latency_s=1e-5):
    """How long decoding waits for a state that takes `all_s` to send, of a prompt of one chunk that takes `prefill_s`.

    Layers are done one after the other, each one's state takes its part, and after the last there is the head.
    """
    n, layers_s = MODEL.n_layers, prefill_s - HEAD_S
    return max(0, max(all_s / n, all_s - layers_s * (n - 1) / n) - HEAD_S + latency_s)


def kept_bytes(policy, prompt, model=MODEL):
    """What decoding finds of a prompt, layer by layer, without any algebra: bytes in HBM and in DDR."""
    kept = {Tier.HBM: 0, Tier.DDR: 0}
    for layer in range(model.n_layers):
        last = Step(prompt_tokens=prompt, past_tokens=0, new_tokens=prompt)
        sides = [
            plan_layer(parse_policy(policy), model, step, layer).buffers for step in (last, Step.decoding(prompt, 1))
        ]
        before, after = ({b.name: b for b in side if not b.view and not b.ring} for side in sides)
        for name in before.keys() & after.keys():
            kept[after[name].tier] += min(before[name].nbytes, after[name].nbytes)
    return kept


def pair(policy, **options):
    """The same lone request on one GPU, and with its prompt on another: both request tables."""
    requests, prompt = trace([1.0], 20_000, 9), {**options}
    alone = simulate(requests, setup(policy, **{**prompt, "gpus": 1})).requests
    apart = simulate(requests, setup(policy, **prompt, gpus=2, prefill_gpus=1)).requests
    assert apart["first_token_s"].tolist() == alone["first_token_s"].tolist()
    assert (apart["prefill_replica"].tolist(), apart["replica"].tolist()) == ([0], [1])
    late_s = apart["finish_s"][0] - alone["finish_s"][0]
    assert apart["handoff_s"][0] == pytest.approx(late_s, rel=1e-6, abs=1e-9)
    return late_s


@pytest.mark.parametrize("fidelity", ["step", "op"])
@pytest.mark.parametrize("nvlink_Bps", [400e9, 10e9, 1e9])
def test_the_tail_of_a_lone_transfer_by_hand(fidelity, nvlink_Bps):
    """On a fast link at most the last layer's state is late; on a slow one all of it moves from the first layer on."""
    expected_s = tail_s(20_000 * TOKEN_BYTES / nvlink_Bps, chunk_s("full", 20_000, 0, 20_000))
    late_s = pair("full", gpu=with_peers(nvlink_Bps), max_num_batched_tokens=1 << 15, fidelity=fidelity)
    assert late_s == pytest.approx(expected_s, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("nvlink_Bps", [400e9, 5e9])
def test_chunks_are_sent_while_later_ones_are_computed(nvlink_Bps):
    """Chunks of 8,192: the link works from the first layer of the first one on, the last one has 3,616 tokens."""
    ends = np.cumsum([chunk_s("full", 20_000, past, new) for past, new in ((0, 8192), (8192, 8192), (16384, 3616))])
    all_s = 20_000 * TOKEN_BYTES / nvlink_Bps
    last_s = all_s * 3616 / 20_000 / MODEL.n_layers
    expected_s = max(0, max(ends[0] / MODEL.n_layers + all_s - ends[2], last_s - HEAD_S) + 1e-5)
    late_s = pair("full", gpu=with_peers(nvlink_Bps), max_num_batched_tokens=8192)
    assert late_s == pytest.approx(expected_s, rel=1e-6, abs=1e-9)


def test_what_is_built_at_the_end_of_a_prompt_is_sent_during_its_last_chunk():
    """ShadowKV decomposes the keys of the whole prompt: nothing of its state is there before."""
    expected_s = tail_s(kept_bytes("shadowkv", 20_000)[Tier.HBM] / 2e9, chunk_s("shadowkv", 20_000, 16384, 3616))
    late_s = pair("shadowkv", gpu=with_peers(2e9), max_num_batched_tokens=8192)
    assert late_s == pytest.approx(expected_s, rel=1e-6)


def test_between_hosts_the_network_carries_everything():
    """As fast as the adapters, but no faster than PCIe; what lies in DDR crosses them too."""
    for nic_Bps, rate_Bps in ((20e9, 20e9), (400e9, GPU.rates.pcie_d2h_Bps)):
        host = replace(LONELY, nic_Bps=nic_Bps)
        for policy in ("full", "offload-all"):
            all_s = 20_000 * TOKEN_BYTES / rate_Bps
            expected_s = tail_s(all_s, chunk_s(policy, 20_000, 0, 20_000), host.nic_latency_s)
            late_s = pair(policy, host=host, max_num_batched_tokens=1 << 15)
            assert late_s == pytest.approx(expected_s, rel=1e-6, abs=1e-9)
    assert Machine(gpu=GPU, host=HOST).nic == (HOST.nic_latency_s, 50e9)
    assert Machine(gpu=GPU, host=replace(HOST, nic_Bps=8e12)).nic[1] == GPU.rates.pcie_d2h_Bps


@pytest.mark.parametrize("policy", ["full", "shadowkv", "offload-all", "quest"])
def test_a_link_without_limits_delays_nothing(policy):
    assert pair(policy, gpu=with_peers(1e30, 0.0)) == pytest.approx(0, abs=1e-9)


def test_two_states_follow_one_another_on_a_link():
    """Two prompts in one iteration are complete at once; the second one's state arrives an X later than the first's."""
    requests = trace([0.0, 0.0], 6000, 2)
    options = {"gpu": with_peers(1e9), "max_num_batched_tokens": 12_000}
    r = simulate(requests, setup(**options, gpus=2, prefill_gpus=1)).requests
    assert r["first_token_s"][0] == r["first_token_s"][1]
    step_s = r["finish_s"][1] - r["finish_s"][0]
    assert step_s == pytest.approx(6000 * TOKEN_BYTES / 1e9, rel=1e-6)
    # To two receivers on two links of their own, the sender's is the one that they share.
    r = simulate(requests, setup(**options, gpus=3, prefill_gpus=1)).requests
    assert r["replica"].tolist() == [1, 2]
    assert r["finish_s"][1] - r["finish_s"][0] == pytest.approx(step_s, rel=1e-6)
    # From two senders to one receiver, it is the receiver's.
    r = simulate(requests, setup(**options, gpus=3, prefill_gpus=2)).requests
    assert r["prefill_replica"].tolist() == [0, 1]
    assert r["finish_s"][1] - r["finish_s"][0] == pytest.approx(step_s, rel=1e-6)


@pytest.mark.parametrize(
    "policy", [*POLICIES, "squeezed-attention:tier=ddr,levels=2", "full@heads=2+sink-window@heads=6"]
)
def test_state_that_is_sent_is_that_of_the_plans(policy):
    """The polynomials against a walk over the plans, around the lengths at which they change."""
    state, rng = SentState(parse_policy(policy), SMALL), np.random.default_rng(0)
    for prompt in [1, 63, 64, 65, 2111, *rng.integers(100, 60_000, 12).tolist()]:
        kept = kept_bytes(policy, prompt, SMALL)
        assert state.bytes_of(prompt) == (kept[Tier.HBM], kept[Tier.DDR], 0)


def test_sent_bytes_by_hand():
    """The dense cache is all of it, a window its sinks and last tokens; ShadowKV's values stay in the host's DDR."""
    assert SentState(parse_policy("full"), MODEL).bytes_of(5000) == (5000 * TOKEN_BYTES, 0, 0)
    window = parse_policy("sink-window:sink_tokens=4,window_tokens=1000")
    assert SentState(window, MODEL).bytes_of(5000) == (1004 * TOKEN_BYTES, 0, 0)
    assert SentState(parse_policy("offload-all"), MODEL).bytes_of(5000) == (0, 5000 * TOKEN_BYTES, 0)


@pytest.mark.parametrize("policy", ["full", "shadowkv", "offload-all"])
@pytest.mark.parametrize("tp", [1, 2])
def test_handed_over_bytes_are_those_of_every_request_that_decodes(policy, tp):
    requests = random_trace(11, 8, prompts=(3000, 12_000), outputs=(1, 6))
    decoded = [
        n for n, out in zip(requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True) if out > 1
    ]
    kept = [kept_bytes(policy, n, MODEL.shard(tp) if tp > 1 else MODEL) for n in decoded]
    s = setup(policy, tp=tp, gpus=4 * tp, prefill_gpus=2 * tp)
    near = simulate(requests, s)
    assert near.traffic["gpu->gpu"]["handoff"] == tp * sum(k[Tier.HBM] for k in kept)
    assert near.traffic["nic"] == dict.fromkeys(near.traffic["nic"], 0)
    host = replace(HOST, gpus_max=2 * tp, gpus_per_switch=tp)
    far = simulate(requests, replace(s, host=host))
    assert far.traffic["gpu->gpu"]["handoff"] == 0
    assert far.traffic["nic"]["handoff"] == tp * sum(k[Tier.HBM] + k[Tier.DDR] for k in kept)
    assert far.links["nic"]["bytes"] == far.traffic["nic"]["handoff"]
    rate_Bps = Machine(gpu=GPU, host=host, tp=tp).nic[1]
    assert far.links["nic"]["busy_s"] == pytest.approx(far.links["nic"]["bytes"] / rate_Bps, rel=1e-9)


def small_room(s, tokens):
    """The setup with room for so many tokens on each GPU."""
    taken = s.rank.weight_bytes + s.reserve_bytes[0]
    gpu = replace(s.gpu, memory_bytes=taken + tokens * SMALL_TOKEN_BYTES // s.tp)
    return replace(s, gpu=gpu, gpu_memory_utilization=1.0, max_num_seqs=s.max_num_seqs)


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_without_room_to_decode_the_state_waits_and_holds_its_memory(fidelity):
    """Room for two sequences on either side: a third prompt waits for its receiver, a fifth for its own prefill."""
    s = small_room(setup(model=SMALL, gpus=2, prefill_gpus=1, max_num_batched_tokens=1000, fidelity=fidelity), 2500)
    result = simulate(trace([0.0] * 6, 1000, [150, 150, 150, 150, 150, 2]), s)
    r = result.requests
    assert (r["status"] == "finished").all()
    first, last = r["first_token_s"], r["finish_s"]
    assert (np.diff(last[:5]) >= 0).all()  # nobody overtakes
    assert r["admitted_s"][4] > last[0]  # the first two left, so that the third and the fourth could go
    assert r["admitted_s"][4] < last[2]
    assert first[4] < last[2]
    for gpu in ("gpu0.hbm", "gpu1.hbm"):
        node = result.memory[gpu]
        assert 2000 * SMALL_TOKEN_BYTES <= node["peak_bytes"] - s.rank.weight_bytes <= 2500 * SMALL_TOKEN_BYTES
    series = result.series
    for number in (0, 1):
        own = series["replica"] == number
        assert series["hbm_bytes"][own][-1] == s.rank.weight_bytes
        assert series["waiting"][own][-1] == series["running"][own][-1] == 0
    gaps, tokens = result.token_gaps
    assert np.dot(gaps, tokens) == pytest.approx((last - first).sum(), rel=1e-9)


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_state_that_stays_in_ddr_is_decoded_as_soon_as_there_is_a_slot(fidelity):
    """One sequence decodes at a time: the second prompt waits for it, and then for nothing, since nothing moves."""
    options = {"gpus": 2, "prefill_gpus": 1, "max_num_seqs": 1, "fidelity": fidelity}
    result = simulate(trace([0.0, 0.001], 1000, [60, 5]), setup("offload-all", model=SMALL, **options))
    r = result.requests
    assert (r["status"] == "finished").all()
    assert r["first_token_s"][1] < r["finish_s"][0]
    assert r["handoff_s"][1] == pytest.approx(r["finish_s"][0] - r["first_token_s"][1], rel=1e-9)
    assert result.traffic["gpu->gpu"]["handoff"] == 0


@st.composite
def clusters(draw):
    n = draw(st.integers(1, 8))
    prompts = draw(st.lists(st.integers(20, 900), min_size=n, max_size=n))
    outputs = draw(st.lists(st.integers(1, 40), min_size=n, max_size=n))
    arrivals = np.cumsum(draw(st.lists(st.floats(0, 0.02) | st.just(0.0), min_size=n, max_size=n)))
    arrivals += 1e-4 * np.sqrt(np.arange(n))  # no two events at once, whose order the fidelities may see differently
    tp = draw(st.sampled_from([1, 2]))
    s = setup(
        draw(st.sampled_from(["full", "snapkv:budget_tokens=64", "quest:budget_tokens=64,page_tokens=16"])),
        model=SMALL,
        tp=tp,
        gpus=4 * tp,
        prefill_gpus=draw(st.integers(1, 3)) * tp,
        host=replace(HOST, gpus_max=draw(st.sampled_from([2, 8])) * tp, gpus_per_switch=1),
        gpu=with_peers(draw(st.sampled_from([1e8, 1e10, 4e11]))),
        router=draw(st.sampled_from(["round-robin", "least-loaded"])),
        preemption=draw(st.sampled_from(["swap", "recompute"])),
        max_num_seqs=draw(st.integers(1, 4)),
        max_num_batched_tokens=draw(st.sampled_from([100, 512, 8192])),
    )
    room = int((max(prompts) + max(outputs)) * draw(st.sampled_from([1.3, 2.5, 100])))
    return trace(arrivals, prompts, outputs), small_room(s, room)


@settings(max_examples=20)
@given(cluster=clusters())
def test_any_small_cluster_ends_and_conserves_and_both_fidelities_agree(cluster):
    requests, s = cluster
    step, op = (simulate(requests, replace(s, fidelity=fidelity)) for fidelity in ("step", "op"))
    for result in (step, op):
        r = result.requests
        assert (r["status"] != "unfinished").all()
        done = r["status"] == "finished"
        assert (r["first_token_s"] <= r["finish_s"])[done].all()
        decodes = done & (r["output_tokens"] > 1)
        assert (r["prefill_replica"] < s.prefill_replicas).all()
        assert (r["replica"][decodes] >= s.prefill_replicas).all()
        if done.all():
            gaps, tokens = result.token_gaps
            assert tokens.sum() == (r["output_tokens"] - 1).sum()
            assert np.dot(gaps, tokens) == pytest.approx((r["finish_s"] - r["first_token_s"]).sum(), rel=1e-6, abs=1e-9)
        for number in range(s.replicas):
            own = result.series["replica"] == number
            assert result.series["hbm_bytes"][own][-1] == s.tp * s.rank.weight_bytes
            assert (np.diff(result.series["time_s"][own]) >= 0).all()
            assert result.series["hbm_bytes"][own].max() <= s.tp * s.gpu.memory_bytes
            assert result.series["hbm_bytes"][own].min() >= s.tp * s.rank.weight_bytes
        state = SentState(s.policy, s.rank)
        sent = sum(state.bytes_of(n)[0] for n in r["prompt_tokens"][decodes].tolist())
        moved = result.traffic["gpu->gpu"]["handoff"] + result.traffic["nic"]["handoff"]
        assert moved == s.tp * sent or not done.all()
    # Step tells when a state comes by its first and its last layer. That is so where chunks are whole prompts, prompts
    # follow one another, and nothing else is on the links: no all-reduces, and no state of another GPU.
    one_by_one = s.max_num_seqs == 1 and s.max_num_batched_tokens == 8192
    if one_by_one and s.tp == 1 and s.host.gpus_max >= s.gpus:
        assert step.requests["replica"].tolist() == op.requests["replica"].tolist()
        assert step.requests["finish_s"] == pytest.approx(op.requests["finish_s"], rel=1e-6, nan_ok=True)


def test_decoding_is_not_disturbed_by_prompts():
    """Four GPUs under long prompts: with two of them for prompts alone, the 99th percentile of TPOT falls."""
    rng = np.random.default_rng(5)
    n = 240
    requests = trace(np.sort(rng.uniform(0, 40, n)), rng.integers(4000, 12_000, n), rng.integers(50, 200, n))
    together, apart = (
        summarize(simulate(requests, setup(gpus=4, prefill_gpus=prefill, router="least-loaded"))) for prefill in (0, 2)
    )
    assert apart["requests"]["finished"] == together["requests"]["finished"] == n
    assert apart["tpot_s"]["p99"] < 0.7 * together["tpot_s"]["p99"]


def test_bad_splits_are_refused():
    with pytest.raises(ValueError, match=r"prefill_gpus=3 must be a multiple of tp=2 from 0 to below gpus=8"):
        setup(gpus=8, tp=2, prefill_gpus=3)
    with pytest.raises(ValueError, match=r"prefill_gpus=2 must be .* below gpus=2; others decode"):
        setup(gpus=2, prefill_gpus=2)
    with pytest.raises(ValueError, match=r"prefix_cache_hbm would take memory.*use prefix_cache_ddr"):
        setup(gpus=2, prefill_gpus=1, prefix_cache_hbm_bytes=1 << 30)
    with pytest.raises(ValueError, match=r"prefill_gpus=1 works with scheduler=fcfs .* not with scheduler=fair"):
        setup(gpus=2, prefill_gpus=1, scheduler="fair")
    with pytest.raises(ValueError, match=r"not with quota or replicas of 'a'"):
        setup(gpus=2, prefill_gpus=1, tenants={"a": Tenant(quota=0.5)})
    with pytest.raises(ValueError, match=r"has no network to hand state over"):
        setup(gpus=9, prefill_gpus=1, host=replace(HOST, nic_Bps=0))
