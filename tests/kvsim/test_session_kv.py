"""What becomes of a session's state between its turns: thresholds in closed form, conservation, regimes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from simulated import GPU, HOST, setup, trace
from tenants import TIMES

from kvsim.__main__ import main
from kvsim.engine.testing import KEPT, PARKED, find_turns
from kvsim.results.summary import summarize
from kvsim.run.simulate import _Cluster, simulate
from kvsim.scenario.choices import SESSION_KVS
from traces import Trace

TOKEN_BYTES = 131072  # of llama-3.1-8b, bf16
PROMPT, OUTPUT = 6000, 100


def conversation(think_s: float, *, waits: bool) -> Trace:
    """A turn, one that goes on from it long after, and perhaps a request that waits when the first one ends."""
    later = [0.01] if waits else []
    return trace(
        [0.0, *later, 500.0],
        [PROMPT, *[500 for _ in later], 7000],
        [OUTPUT, *[5 for _ in later], 10],
        session=[0, *[-1 for _ in later], 0],
        think_s=[np.nan, *[np.nan for _ in later], think_s],
    )


def with_pcie(up_Bps: float):
    return replace(GPU, rates=replace(GPU.rates, pcie_h2d_Bps=up_Bps))


def fate(requests: Trace, **options) -> dict[str, int]:
    """What became of states where one sequence runs at a time; the last turn's is kept, since nobody waits then."""
    result = simulate(requests, setup("full", max_num_seqs=1, session_kv="cheapest", **options))
    assert result.session_kv["kept"] >= 1
    return result.session_kv | {"kept": result.session_kv["kept"] - 1}


STATE_BYTES = (PROMPT + OUTPUT) * TOKEN_BYTES


def anew_s() -> float:
    """A prefill of the whole context, alone on a replica."""
    return float(simulate(trace([0.0], PROMPT + OUTPUT - 1, 1), setup("full")).requests["finish_s"][0])


@pytest.mark.parametrize(("factor", "swapped"), [(0.99, 0), (1.01, 1)])
def test_swap_or_recompute_turns_where_a_transfer_takes_as_long_as_a_prefill(factor: float, swapped: int) -> None:
    """Mooncake's inequality: bandwidth against bytes over the prefill that they save."""
    threshold_Bps = STATE_BYTES / (anew_s() - GPU.rates.pcie_latency_s)
    assert 1e9 < threshold_Bps < 20e9
    found = fate(conversation(1e9, waits=True), gpu=with_pcie(factor * threshold_Bps))
    assert (found["swapped"], found["dropped"], found["kept"]) == (swapped, 1 - swapped, 0)
    assert found["resumed"] == swapped


@pytest.mark.parametrize("factor", [0.99, 1.01])
@pytest.mark.parametrize("up_Bps", [20e9, 1e9])
def test_keeping_pays_up_to_a_think_time(up_Bps: float, factor: float) -> None:
    """Its share of the HBM for so long against the cheaper way back, for the one of two turns that is gone on from."""
    s = setup("full", max_num_seqs=1)
    up_s = GPU.rates.pcie_latency_s + STATE_BYTES / up_Bps
    back_s, other = min((up_s, "swapped"), (anew_s(), "dropped"))
    think_s = 0.5 * back_s / (STATE_BYTES / s.capacity()[0])
    found = fate(conversation(factor * think_s, waits=True), gpu=with_pcie(up_Bps))
    assert found["kept"] == (factor < 1)
    assert found[other] == (factor > 1)
    idle = fate(conversation(factor * think_s, waits=False), gpu=with_pcie(up_Bps))
    assert (idle["kept"], idle["resumed"]) == (1, 1)  # nobody waits for the memory


def test_a_swapped_turn_waits_for_its_state_and_a_kept_one_computes_at_once() -> None:
    requests = conversation(1.0, waits=False)
    ttft_s = {}
    for mode in SESSION_KVS:
        result = simulate(requests, setup("full", session_kv=mode))
        columns = result.requests
        ttft_s[mode] = float(columns["first_token_s"][1] - columns["arrival_s"][1])
        assert columns["cached_tokens"].tolist() == [0, 0 if mode == "recompute" else PROMPT + OUTPUT - 1]
        up_bytes = result.traffic["ddr->hbm"]["swaps"]
        assert up_bytes == (STATE_BYTES - TOKEN_BYTES if mode == "swap" else 0)  # of the tokens that are gone on from
        down_bytes = result.traffic["hbm->ddr"]["swaps"]  # of both turns, the second's of 7,010 tokens
        assert down_bytes == (STATE_BYTES + 7010 * TOKEN_BYTES if mode in ("swap", "cheapest") else 0)
    up_s = GPU.rates.pcie_latency_s + (STATE_BYTES - TOKEN_BYTES) / min(GPU.rates.pcie_h2d_Bps, HOST.switch_Bps)
    assert ttft_s["swap"] - ttft_s["keep"] == pytest.approx(up_s, rel=1e-9)
    assert ttft_s["cheapest"] == ttft_s["keep"]
    assert ttft_s["recompute"] > 5 * ttft_s["keep"]


def sessions(seed: int, n: int, turns: int, *, outputs=(20, 200), think_s: float = 5.0, span_s: float = 10.0) -> Trace:
    """Conversations whose prompts are all that was said before, and something new."""
    rng, rows = np.random.default_rng(seed), []
    for session in range(n):
        at_s, prompt, thought_s = rng.uniform(0, span_s), int(rng.integers(2000, 20_000)), np.nan
        for _ in range(turns):
            output = int(rng.integers(*outputs))
            rows.append((at_s, prompt, output, session, thought_s))
            thought_s = float(rng.exponential(think_s))
            at_s, prompt = at_s + thought_s + 1, prompt + output + int(rng.integers(100, 2000))
    names = ("arrival_s", "prompt_tokens", "output_tokens", "session", "think_s")
    return Trace.from_columns(name="sessions", **dict(zip(names, zip(*sorted(rows), strict=True), strict=True)))


@pytest.mark.parametrize("mode", SESSION_KVS[1:])
def test_memory_that_is_held_is_that_of_states_and_both_fidelities_agree(mode: str) -> None:
    """Where memory is short: what is not dropped is held, all of it and nothing else, and nothing exceeds it."""
    requests, times = sessions(1, 8, 3, outputs=(2, 20), span_s=4.0), []
    for fidelity in ("step", "op"):
        options = {"kv_cache_tokens": 41_200, "host_memory_utilization": 0.005, "fidelity": fidelity}
        cluster = _Cluster(requests, setup("full", session_kv=mode, sessions="closed", **options))
        cluster.play(None)
        state = cluster.engine.cluster
        stays = np.isin(state.requests["queue"], (KEPT, PARKED))
        assert (state.requests["held"][stays].sum(axis=0) == state.replicas["held_bytes"][0]).all()
        assert not state.replicas["stored_bytes"].any()
        hbm_bytes, ddr_bytes, _ = cluster.setup.capacity()
        swapped_out = int(state.replicas["swap_down_bytes"][0])
        result = cluster.outcome().result(wall_s=0, cpu_s=0, setup_cpu_s=0)
        assert result.series["hbm_bytes"].max() - cluster.setup.rank.weight_bytes <= hbm_bytes
        assert result.series["ddr_bytes"].max() <= ddr_bytes
        assert (result.requests["status"] == "finished").all()
        counts = result.session_kv
        assert counts["kept"] + counts["swapped"] + counts["dropped"] == len(requests)
        assert counts["evicted"] > 0
        assert counts["resumed"] == (result.requests["cached_tokens"] > 0).sum()
        assert result.traffic["hbm->ddr"]["swaps"] == swapped_out
        times.append({name: result.requests[name] for name in TIMES})
    for name in TIMES:
        assert times[0][name] == pytest.approx(times[1][name], rel=1e-9)


def test_a_turn_takes_over_what_lies_in_ddr_where_there_is_no_room_for_both() -> None:
    """Half as much again as a state, all of which is in DDR anyway: the next turn is no second state beside it."""
    requests, s = conversation(1.0, waits=False), setup("offload-all", session_kv="swap")
    ddr_bytes = 3 * STATE_BYTES // 2
    small = replace(s, host=replace(HOST, ddr_bytes=ddr_bytes), host_memory_utilization=1.0)
    result = simulate(requests, small)
    assert result.requests["status"].tolist() == ["finished", "finished"]
    assert result.session_kv["resumed"] == 1
    assert STATE_BYTES < result.memory["host0.ddr"]["peak_bytes"] < ddr_bytes


REGIMES = {  # and the fixed choice that is best there
    "ample memory": ({}, "keep"),
    "little HBM": ({"kv_cache_tokens": 41_200}, "swap"),
    "a slow link": ({"kv_cache_tokens": 41_200, "gpu": with_pcie(0.5e9)}, "keep"),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_the_cheapest_is_no_worse_than_the_best_fixed_choice(regime: str) -> None:
    """Within 1 % of mean latency. (To keep what is dropped when it is in the way is never worse than to drop it.)"""
    options, best = REGIMES[regime]
    e2e_s = {
        mode: float(
            np.mean(
                [
                    summarize(
                        simulate(sessions(seed, 14, 4), setup("full", session_kv=mode, sessions="closed", **options))
                    )["e2e_s"]["mean"]
                    for seed in range(3)
                ]
            )
        )
        for mode in SESSION_KVS
    }
    fixed = {mode: seconds for mode, seconds in e2e_s.items() if mode != "cheapest"}
    assert min(fixed, key=lambda mode: fixed[mode]) == best
    assert e2e_s["cheapest"] <= 1.01 * fixed[best]
    assert (e2e_s["swap"] > e2e_s["recompute"]) is (regime == "a slow link")


def test_a_session_stays_where_its_state_is() -> None:
    requests = sessions(2, 9, 4, think_s=1.0)
    result = simulate(requests, setup("full", gpus=3, session_kv="keep", sessions="closed"))
    for session in range(9):
        assert len(set(result.requests["replica"][requests.session == session])) == 1
    alone = simulate(requests, setup("full", gpus=3, sessions="closed"))
    assert any(len(set(alone.requests["replica"][requests.session == n])) > 1 for n in range(9))


def test_turns_are_found_by_blocks_or_else_by_length() -> None:
    by_blocks = Trace.from_columns(
        name="blocks",
        arrival_s=[0, 1, 2, 3, 4],
        prompt_tokens=[30, 25, 45, 30, 40],
        output_tokens=[5, 5, 5, 5, 5],
        session=[0, 0, 0, 1, 0],
        block_tokens=10,
        block_ids=[*(1, 2, 3), *(7, 8), *(1, 2, 3, 4), *(1, 2, 3), *(1, 2, 9, 10)],
        block_counts=[3, 2, 4, 3, 4],
    )
    found = find_turns(by_blocks)
    # Another session's blocks are not its own; the last one goes on from the third, the last to have had blocks 1, 2.
    assert found.parent.tolist() == [-1, -1, 0, -1, 2]
    assert found.shared_tokens.tolist() == [0, 0, 30, 0, 20]
    by_length = Trace.from_columns(
        name="lengths", arrival_s=[0, 1, 2], prompt_tokens=[30, 35, 20], output_tokens=[5, 5, 5], session=[0, 0, 0],
        think_s=[np.nan, 0.5, 0.5],
    )  # fmt: skip
    found = find_turns(by_length)
    assert found.parent.tolist() == [-1, 0, -1]  # the third is too short to contain the second
    assert found.shared_tokens.tolist() == [0, 34, 0]
    assert (found.think_s, found.return_share) == (0.5, 1 / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"session_kv": "kept"}, r"^unknown session_kv 'kept'; did you mean 'keep'\?"),
        ({"session_kv": "keep", "prefix_cache_ddr_bytes": 1 << 30}, r"^session_kv=keep holds .* prefix_cache_ddr does"),
        ({"session_kv": "swap", "gpus": 2, "prefill_gpus": 1}, r"^session_kv=swap holds .* prefill_gpus does"),
        ({"session_kv": "swap"}, r"^trace 'test' has no sessions; replay it with session_kv=recompute$"),
    ],
)
def test_what_does_not_go_with_it(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(trace([0.0], 10, 10), setup("full", **options))


def test_agents_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The head of a recorded trace, whose turns share nearly all of their prompts; sink-window can keep no state."""
    args = ["simulate", "--trace", "agentic-coding", "--limit", "60", "--model", "llama-3.1-8b", "--gpu", "h100-sxm"]
    args += ["--sessions", "closed", "--session-kv", "cheapest", "--json"]
    assert main(args) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["inputs"]["session_kv"] == "cheapest"
    assert summary["session_kv"]["resumed"] > 30
    assert summary["tokens"]["prompt_cached"] > 0.7 * summary["tokens"]["prompt"]
    assert main([*args, "--policy", "sink-window"]) == 0
    out, err = capsys.readouterr()
    assert "warning: session_kv=cheapest has no effect on sink-window" in err
    assert not any(json.loads(out)["session_kv"].values())
