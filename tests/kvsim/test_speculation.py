"""Several tokens per decode step: closed forms, a Monte Carlo of the acceptance, hand counts and published speedups."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kvsim.__main__ import main
from kvsim.explain.costs import Explainer
from kvsim.hardware.catalogue import load_gpu, load_host
from kvsim.hardware.machine import Machine
from kvsim.iteration.clock import Clock, Load
from kvsim.models import load_model
from kvsim.plans.derive import PlanTable
from kvsim.plans.guessing import Guesser
from kvsim.scenario.speculation import Speculation, speculation
from policies import POLICIES, Full, LayerPlan, Step, parse_policy, plan_layer
from policies.plan import flops

GPU, HOST = load_gpu("a100-80g-sxm@eager"), load_host("ddr5-dual-xeon")
TARGET, DRAFT = load_model("llama-2-70b"), load_model("llama-3.2-1b")
SMALL = load_model("llama-2-7b")


def guesses(k=4, acceptance=(0.7,), target=SMALL, **options):
    return speculation(target, k, acceptance, options.get("tree"), options.get("draft"), options.get("draft_share"))


def explainer(spec, model=SMALL, policy="full", **options):
    return Explainer(parse_policy(policy), model, GPU, HOST, speculation=spec, **options)


@pytest.mark.parametrize("k", [1, 4, 7])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8])
def test_tokens_per_step_is_the_geometric_series(k, alpha):
    """arXiv:2211.17192, equation 1."""
    expected = (1 - alpha ** (k + 1)) / (1 - alpha)
    assert guesses(k, (alpha,), draft="lookup").tokens_per_step == pytest.approx(expected, abs=2**-20)


def test_tokens_per_step_is_the_mean_of_sampled_steps():
    """Each guess holds or not, and the first that does not ends the step, which adds one token of its own."""
    each, rng = (0.9, 0.6, 0.75), np.random.default_rng(0)
    holds = rng.random((200_000, 3)) < each
    emitted = 1 + np.cumprod(holds, axis=1).sum(axis=1)
    error = emitted.std() / np.sqrt(len(emitted))
    assert abs(guesses(3, each, draft="lookup").tokens_per_step - emitted.mean()) < 4 * error


@pytest.mark.parametrize(
    ("k", "alpha", "share", "expected"),
    [(7, 0.75, 0.02, 3.2), (7, 0.80, 0.04, 3.3), (7, 0.82, 0.11, 2.5)],
)
def test_speedup_of_a_drafting_model_is_that_of_the_paper(k, alpha, share, expected):
    """The expected speedups of T5-XXL with three drafts, arXiv:2211.17192, appendix: the same shares on our shapes.

    There a run of the target takes equally long for one token and for k + 1. Here the arithmetic of k more tokens comes
    on top of streaming the weights: 5 % of a step of a 70B model on eight GPUs.
    """
    spec = guesses(k, (alpha,), TARGET, draft_share=share)
    plain, drafted = (explainer(s, TARGET, tp=8).costs(512) for s in (None, spec))
    step_s = drafted.decode_s_per_token * spec.tokens_per_step
    verify_s = step_s - k * share * plain.decode_s_per_token
    arithmetic_s = k * 2 * TARGET.active_params / (8 * GPU.rates.flops("bf16"))
    assert verify_s == pytest.approx(plain.decode_s_per_token + arithmetic_s, rel=0.01)
    ideal = spec.tokens_per_step / (k * share + 1)
    assert ideal == pytest.approx(expected, abs=0.06)  # printed to one digit, from alphas of two
    assert plain.decode_s_per_token / drafted.decode_s_per_token == pytest.approx(ideal, rel=0.05)


def test_medusa_speedup_is_tokens_per_step_over_overhead():
    """arXiv:2401.10774, table 1: Vicuna-7B emits 3.47 tokens a step, takes 1.22 times as long for it, gains 2.83x.

    The tokens are given, by the acceptance that makes them; the overhead is ours, by hand: the arithmetic of 63 more
    tokens, and five heads of (4,096 + 32,000) x 4,096 weights. It is larger, 1.66, since that paper's plain decoding
    in Hugging Face spends most of its time on launches, which kvsim does not slow down for.
    """
    given = 3.47
    assert given / 1.22 == pytest.approx(2.83, abs=0.02)
    alpha = np.roots([1, 1, 1, 1, 1, 1 - given])
    alpha = float(next(root.real for root in alpha if abs(root.imag) < 1e-9 and 0 < root.real < 1))
    spec = guesses(5, (alpha,), draft="medusa", tree=63)
    assert spec.tokens_per_step == pytest.approx(given, abs=1e-5)
    plain, heads = (explainer(s).costs(1024) for s in (None, spec))
    overhead = heads.decode_s_per_token * spec.tokens_per_step / plain.decode_s_per_token
    head_params = 4096**2 + 4096 * 32000
    flop_s, rates = 1 / GPU.rates.flops("bf16"), GPU.rates
    further_s = (63 * 2 * SMALL.active_params + 64 * 2 * 5 * head_params) * flop_s
    further_s += 5 * (2 * rates.launch_s + 2 * head_params / rates.hbm_Bps)
    assert overhead == pytest.approx(1 + further_s / plain.decode_s_per_token, rel=0.01)
    assert overhead == pytest.approx(1.66, abs=0.01)
    assert Guesser(spec, SMALL, Machine(gpu=GPU, host=HOST)).weight_bytes == 5 * head_params * 2


@pytest.mark.parametrize("tp", [1, 4])
def test_a_draft_takes_as_long_as_the_same_model_decoding_by_itself(tp):
    """K runs of the draft, priced as a target of its own at each length; HBM bounds attention in all of them."""
    spec = guesses(3, (0.5,), TARGET, draft="llama-3.2-1b")
    machine = Machine(gpu=GPU, host=HOST, tp=tp)
    rank, own = TARGET.shard(tp), DRAFT.shard(tp)
    guesser = Guesser(spec, rank, machine)
    table, clock = PlanTable(Full(), own, machine, {}), Clock(own, machine)
    batch, prompt, alone_s = 6, 4000, 0.0
    for run in range(3):
        segment = table.decode(prompt, 1 + run)
        alone_s += clock.iteration([Load(segment.piece.structure, segment.start * batch)], batch, batch)[0]
    flops_, nbytes, cache = PlanTable(Full(), rank, machine, {}, guesser).decode(prompt, 1).start[[-6, -5, -3]]
    assert cache == rank.kv_bytes(prompt + 4) + own.kv_bytes(prompt + 3)
    attention_s = batch * max(flops_ / GPU.rates.attention_flops, nbytes / GPU.rates.hbm_Bps)
    # Appending, a row read and written, counts at the rate of attention here, and there at that of small kernels.
    append_s = 3 * batch * 2 * own.kv_bytes(1) * (1 / GPU.rates.elementwise_Bps - 1 / GPU.rates.hbm_Bps)
    once_s, each_s = guesser.parts[0].sum(axis=1)
    assert once_s + batch * each_s + attention_s + append_s == pytest.approx(alone_s, rel=1e-9)


def verified(policy, step, layer=2) -> LayerPlan:
    return plan_layer(policy, SMALL, step, layer)


@pytest.mark.parametrize("name", [name for name, kind in POLICIES.items() if kind.verifies])
def test_verifying_one_token_is_decoding_it_and_several_add_their_pairs(name):
    """A step of m new tokens does the FLOPs of m steps on the same cache, each new one seeing those before it."""
    policy, prompt, m = parse_policy(name), 20_000, 5
    step = Step(prompt_tokens=prompt, past_tokens=prompt + 99, new_tokens=m)
    attend = next(op for op in verified(policy, step).ops if op.name == "attend")
    singles = [
        next(op for op in verified(policy, Step.decoding(prompt, 100 + i)).ops if op.name == "attend") for i in range(m)
    ]
    window = m * (m - 1) // 2 if name == "sink-window" else 0  # keys that leave the window meanwhile
    assert attend.rows.fixed - window == sum(op.rows.fixed for op in singles)
    one = Step(prompt_tokens=prompt, past_tokens=prompt + 99, new_tokens=1)
    assert verified(policy, one) == verified(policy, Step.decoding(prompt, 100))
    assert flops((attend,), {}) > flops((singles[0],), {})


def test_what_is_wrong_with_options_is_said(capsys):
    for options, complaint in (
        (["--speculate", "4", "--draft", "lookup"], "needs acceptance"),
        (["--speculate", "4", "--acceptance", "0.7"], "needs one of draft"),
        (["--speculate", "4", "--acceptance", "0.7,0.6", "--draft", "lookup"], "2 probabilities for speculate=4"),
        (["--speculate", "4", "--acceptance", "1.5", "--draft", "lookup"], "acceptance=1.5"),
        (["--speculate", "4", "--acceptance", "0.7", "--draft", "lookup", "--tree", "3"], "tree=3"),
        (["--speculate", "4", "--acceptance", "0.7", "--draft", "medsa"], "did you mean 'medusa'"),
        (["--speculate", "4", "--acceptance", "0.7", "--draft", "mixtral-8x7b"], "routes experts"),
        (["--speculate", "4", "--acceptance", "0.7", "--draft", "lookup", "--policy", "quest"], "quest chooses keys"),
        (["--tree", "4"], "tree is of speculate"),
    ):
        assert main(["explain", *options]) == 2
        assert complaint in capsys.readouterr().err


def test_explain_prints_tokens_per_step(capsys):
    arguments = ["explain", "--policy", "full", "--speculate", "2", "--acceptance", "0.5", "--draft", "lookup"]
    assert main([*arguments, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["tokens_per_step"] == 1.75
    assert main(arguments) == 0
    assert "tokens/step" in capsys.readouterr().out


def test_a_speculation_refuses_figures_out_of_range():
    fine = Speculation(guesses=2, acceptance=(0.5,), candidates=2, method="lookup")
    for changes in ({"guesses": 0}, {"candidates": 1}, {"acceptance": ()}, {"draft_share": 0.0}):
        with pytest.raises(ValueError, match=r"must be|cannot|probabilities"):
            replace(fine, **changes)
