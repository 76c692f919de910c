"""Simulations whose decode steps emit several tokens: hand counts, closed forms, both fidelities, what is refused."""

import json
import math

import numpy as np
import pytest
from simulated import GPU, HOST, MODEL, random_trace, setup, trace

from kvsim.__main__ import main
from kvsim.engine.testing import Engine, PrefixTiers
from kvsim.explain.costs import Explainer
from kvsim.iteration.clock import Clock, Load
from kvsim.plans.derive import PlanTable
from kvsim.plans.guessing import guesser_of
from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate
from kvsim.scenario.scenario_file import load_scenario
from kvsim.scenario.speculation import speculation
from policies import Full


def guesses(k=3, alpha=0.7, **options):
    named = {"tree": None, "draft": None, "draft_share": None} | options
    return speculation(MODEL, k, (alpha,), named["tree"], named["draft"], named["draft_share"])


LOOKUP, SHARED = guesses(draft="lookup"), guesses(draft_share=0.1)
PERFECT = guesses(alpha=1.0, draft="lookup")  # four tokens a step


def test_where_all_guesses_hold_steps_are_counted_by_hand():
    """Four tokens a step: a request of n tokens after its first takes ceil(n / 4) steps, whatever else runs."""
    requests = random_trace(2, 12, prompts=(100, 3000), outputs=(2, 300))
    result = simulate(requests, setup("full", speculation=PERFECT))
    expected = sum(math.ceil((n - 1) / 4) for n in requests.output_tokens.tolist())
    found = summarize(result)["speculation"]
    assert found["steps"] == expected
    assert found["emitted_per_step"] == (requests.output_tokens - 1).sum() / expected
    assert found["tokens_per_step"] == 4


def test_alone_a_request_takes_its_steps_one_by_one():
    """Each step is priced at the mean position, between the prices of the two tokens around it, and then the draft."""
    prompt, output = 3000, 400
    result = simulate(trace([0.0], prompt, output), setup("full", speculation=SHARED))
    decoding_s = float(result.requests["finish_s"][0] - result.requests["first_token_s"][0])
    own = setup("full", speculation=SHARED)
    guesser = guesser_of(own)
    table, clock = PlanTable(Full(), MODEL, own.machine(), {}, guesser), Clock(MODEL, own.machine())

    def step_s(generated):
        segment = table.decode(prompt, generated)
        return clock.iteration([Load(segment.piece.structure, segment.start)], tokens=4, logits=4)[0]

    total_s, position = 0.0, 1.0
    while position < output:
        fed, share = int(position), position % 1
        total_s += (1 - share) * step_s(fed) + share * step_s(fed + 1) + float(guesser.parts[0].sum())
        position += SHARED.tokens_per_step
    assert decoding_s == pytest.approx(total_s, rel=1e-7)
    # and explain's figure, at the middle of the output, is what a token takes but for the last step's surplus
    costs = Explainer(Full(), MODEL, GPU, HOST, speculation=SHARED).costs(prompt + output // 2)
    assert decoding_s / (output - 1) == pytest.approx(costs.decode_s_per_token, rel=0.01)


def test_the_mean_is_that_of_sampled_steps():
    """Sampled step by step, requests of 300 tokens take as many steps in the mean as ours do, but for the last one."""
    rng, k, alpha, n = np.random.default_rng(5), 3, 0.7, 300
    emitted = 1 + np.cumprod(rng.random((2000, n, k)) < alpha, axis=2).sum(axis=2)
    sampled = (np.cumsum(emitted, axis=1) < n).sum(axis=1) + 1
    result = simulate(trace([0.0], 500, n + 1), setup("full", speculation=LOOKUP))
    ours = summarize(result)["speculation"]["steps"]
    assert ours == math.ceil(n / LOOKUP.tokens_per_step)
    assert abs(ours - sampled.mean()) < 1


@pytest.mark.parametrize("policy", ["full", "offload-all", "sink-window", "full@below=2k+snapkv"])
def test_both_fidelities_agree(policy):
    """With a draft, prompts in chunks, and steps that change their plan on the way."""
    requests = random_trace(8, 6, prompts=(500, 9000), outputs=(1, 90))
    options = {"max_num_batched_tokens": 1024, "max_num_seqs": 3, "speculation": SHARED, "scheduler": "fair"}
    step, op = (simulate(requests, setup(policy, fidelity=f, **options)) for f in ("step", "op"))
    for name in ("first_token_s", "finish_s"):
        assert step.requests[name] == pytest.approx(op.requests[name], rel=1e-6)
    assert step.traffic == op.traffic
    assert summarize(step)["speculation"] == summarize(op)["speculation"]


def test_memory_is_freed_and_output_credited():
    """Whatever fractions of tokens steps end at, a tenant is credited with those that its requests got."""
    requests = random_trace(3, 20, prompts=(500, 9000), outputs=(1, 200))
    own = setup("full", speculation=SHARED, scheduler="fair", max_num_batched_tokens=2048)
    guesser, machine = guesser_of(own), own.machine()
    table, clock = PlanTable(own.policy, MODEL, machine, {}, guesser), Clock(MODEL, machine, guesser)
    engine = Engine(requests, own, table, clock, PrefixTiers(requests, own))
    while engine.play(5000):
        pass
    replicas, tenants = engine.cluster.replicas, engine.cluster.tenants
    assert not replicas["stored_bytes"].any()
    assert not replicas["held_bytes"].any()
    assert not replicas["growth_bytes"].any()
    assert tenants["output_tokens"].sum() == requests.output_tokens.sum()


def test_weights_read_are_those_of_steps_and_drafts():
    """One request: a prefill of model and draft, then steps that read the model once and the draft three times."""
    result = simulate(trace([0.0], 700, 50), setup("full", speculation=SHARED))
    steps = math.ceil(49 / SHARED.tokens_per_step)
    layers = sum(MODEL.bytes_of(x.qkv_params + x.out_params) + MODEL.bytes_of(x.mlp_params) for x in MODEL.layers)
    model = layers + MODEL.head_bytes
    draft = steps * round(0.1 * 3 * model) + round(0.1 * layers)
    assert result.traffic["hbm->sm"]["weights"] == (steps + 1) * model + draft


def test_memory_has_the_weights_that_guess():
    """A replica that has nothing to do holds the model and Medusa's heads, a residual layer and a vocabulary each."""
    result = simulate(trace([0.0], 700, 50), setup("full", speculation=guesses(draft="medusa")))
    heads = 3 * (MODEL.hidden_dim**2 + MODEL.hidden_dim * MODEL.vocab_size)
    assert result.series["hbm_bytes"][0] == MODEL.weight_bytes + MODEL.bytes_of(heads)
    assert result.memory["gpu0.hbm"]["peak_bytes"] == result.series["hbm_bytes"].max()


def test_preempted_sequences_finish():
    """So little memory that sequences are swapped out or recomputed: all requests still get their tokens."""
    requests = trace([0.0] * 12, 3000, 600)
    for preemption in ("swap", "recompute"):
        tight = setup("full", speculation=SHARED, preemption=preemption, kv_cache_tokens=32_500)
        result = simulate(requests, tight)
        assert (result.requests["status"] == "finished").all()
        assert result.requests["preemptions"].sum() > 0


def test_what_a_draft_cannot_go_with_is_refused():
    for options, complaint in (
        ({"prefix_cache_ddr_bytes": 1 << 30}, "a prefix cache"),
        ({"gpus": 2, "prefill_gpus": 1}, "prefill_gpus"),
    ):
        with pytest.raises(ValueError, match=complaint):
            setup("full", speculation=SHARED, **options)
        setup("full", speculation=LOOKUP, **options)
    with pytest.raises(ValueError, match="quest chooses keys for one new token"):
        setup("quest", speculation=LOOKUP)


def test_a_scenario_file_says_what_flags_say(tmp_path, capsys):
    options = {"speculate": 2, "acceptance": [0.8, 0.5], "draft": "lookup"}
    file = tmp_path / "s.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in options.items()), encoding="utf-8")
    needed = {"trace": "azure-2023-code", "model": "llama-3.1-8b", "gpu": "h100-sxm"}
    (from_file,) = load_scenario(needed, file).setups()
    (from_flags,) = load_scenario({**needed, "speculate": 2, "acceptance": "0.8,0.5", "draft": "lookup"}).setups()
    assert from_file.speculation == from_flags.speculation
    assert from_file.speculation.tokens_per_step == pytest.approx(1 + 0.8 + 0.4, abs=1e-6)
    flags = [word for key, value in needed.items() for word in (f"--{key}", value)]
    flags += ["--speculate", "2", "--acceptance", "0.8,0.5", "--draft", "lookup", "--limit", "5", "--json"]
    assert main(["simulate", *flags]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["inputs"]["speculation"]["acceptance"] == [0.8, 0.5]
    assert summary["speculation"]["tokens_per_step"] == pytest.approx(2.2, abs=1e-6)
    assert main(["simulate", *flags[:6], "--acceptance", "0.5"]) == 2
    assert "acceptance is of speculate" in capsys.readouterr().err
