"""Plans against closed forms and plain simulations: the answer holds, one replica fewer does not; figures recur."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import traces
from kvsim import Setup, load_gpu, load_host, load_model, plan, simulate, summarize
from kvsim.__main__ import main
from kvsim.planning.planner import Planner
from policies import Full, parse_policy
from traces import Trace

MODEL, GPU, HOST = "llama-3.1-8b", "h100-sxm", "ddr5-dual-xeon"
PROMPT, REQUESTS = 4096, 120
PLAIN: dict[str, Any] = {"gpu": GPU, "model": MODEL, "pools": False}


def written(trace: Trace, folder: Path) -> str:
    path = folder / "trace.jsonl"
    traces.write(trace, path)
    return str(path)


def even(gap_s: float) -> Trace:
    """Prompts of one length and one output token each, evenly spaced."""
    return Trace.from_columns(
        name="even",
        arrival_s=gap_s * np.arange(REQUESTS),
        prompt_tokens=np.full(REQUESTS, PROMPT),
        output_tokens=np.ones(REQUESTS),
    )


def setup(**options: Any) -> Setup:
    given: dict[str, Any] = {"policy": Full(), "gpu": load_gpu(GPU), **options}
    return Setup(model=load_model(MODEL), host=load_host(HOST), **given)


def played(row: dict[str, Any], trace: Trace, **options: Any) -> dict[str, Any]:
    """The summary of a plan's fleet, played by `simulate` itself."""
    fleet = setup(
        policy=parse_policy(row["policy"]),
        gpu=load_gpu(row["gpu"]),
        gpus=row["gpus"],
        tp=row["tp"],
        prefill_gpus=row["prefill_gpus"],
        **options,
    )
    return summarize(simulate(trace, fleet))


@pytest.mark.parametrize("replicas", [1, 3])
def test_replicas_of_evenly_spaced_prompts_are_counted_by_hand(replicas: int, tmp_path: Path) -> None:
    """n replicas in turn see a prompt every n gaps: nobody waits where its prefill is done by then, else all do."""
    alone_s = summarize(simulate(even(1.0).head(1), setup(max_num_batched_tokens=PROMPT)))["ttft_s"]["max"]
    gap_s = alone_s / (replicas - 0.5)
    found = plan(
        trace=written(even(gap_s), tmp_path),
        slo=f"ttft_p99={1.001 * alone_s}s",
        tp=1,
        max_num_batched_tokens=PROMPT,
        **PLAIN,
    )
    assert found.answer is not None
    assert found.answer["gpus"] == replicas
    assert found.answer["slo"]["ttft_p99"]["value_s"] == pytest.approx(alone_s, rel=1e-9)


@pytest.fixture(scope="module")
def chat() -> Trace:
    return traces.load("azure-2023-conv", limit=300).scaled_rate(40)


CHAT: dict[str, Any] = {
    "trace": "azure-2023-conv",
    "limit": 300,
    "rate_scale": 40.0,
    "slo": "ttft_p99=1s,tpot_p99=30ms",
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a plan with two GPUs, two policies and pools, by the command line."""
    return asked(["--gpu", GPU, "--gpu", "a100-80g-sxm", "--policy", "full", "--policy", "shadowkv"])[1]


def asked(further: list[str]) -> tuple[int, dict[str, Any], str]:
    """Exit code, document and standard error of `kvsim plan --json`."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    words = ["plan", "--json", "--trace", CHAT["trace"], "--limit", "300", "--rate-scale", "40", "--model", MODEL]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*words, *([] if "--slo" in further else ["--slo", CHAT["slo"]]), *further])
    return code, json.loads(out.getvalue()) if out.getvalue() else {}, err.getvalue()


def test_the_answer_holds_and_one_replica_fewer_breaks_it(planned: dict[str, Any], chat: Trace) -> None:
    answer = planned["answer"]
    assert played(answer, chat)["ttft_s"]["p99"] <= 1
    assert played(answer, chat)["tpot_s"]["p99"] <= 0.03
    fewer = answer | {key: answer["fewer"][key] for key in ("gpus", "prefill_gpus")}
    assert fewer["gpus"] == answer["gpus"] - answer["tp"] * answer["pp"]
    broken = played(fewer, chat)
    assert broken["ttft_s"]["p99"] > 1 or broken["tpot_s"]["p99"] > 0.03
    assert answer["fewer"]["slo"]["tpot_p99"]["value_s"] == broken["tpot_s"]["p99"]


def test_the_answer_is_the_cheapest_plan_and_every_line_is_there(planned: dict[str, Any]) -> None:
    rows = [row for row in planned["plans"] if row["feasible"]]
    assert planned["answer"]["usd_per_hour"] == min(row["usd_per_hour"] for row in rows)
    listed = ("policy", "gpu", "gpus", "tp", "prefill_gpus", "options")
    assert [planned["plans"][0][key] for key in listed] == [planned["answer"][key] for key in listed]
    assert {(row["gpu"], row["policy"]) for row in planned["plans"]} == {
        (gpu, policy) for gpu in (GPU, "a100-80g-sxm") for policy in ("full", "shadowkv")
    }


def test_its_command_gives_its_figures_again(
    planned: dict[str, Any], capsys: pytest.CaptureFixture[str], chat: Trace
) -> None:
    answer = planned["answer"]
    words = shlex.split(answer["simulate"])
    assert words.pop(0) == "kvsim"
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    for name, latency in (("ttft_p99", "ttft_s"), ("tpot_p99", "tpot_s")):
        assert answer["slo"][name]["value_s"] == summary[latency]["p99"]
        assert answer["slo"][name]["low_s"] <= summary[latency]["p99"] <= answer["slo"][name]["high_s"]
    assert answer["goodput_rps"] == summary["goodput_rps"]
    assert answer["bottleneck"] == summary["bottleneck"]
    cost = answer["usd_per_hour"] / 3600 / summary["output_tokens_per_s"] * 1e6
    assert answer["cost_per_million_tokens"] == pytest.approx(cost, rel=1e-12)
    assert answer["usd_per_hour"] == pytest.approx(answer["gpus"] * {GPU: 2.69, "a100-80g-sxm": 1.39}[answer["gpu"]])
    assert len(chat) == summary["requests"]["submitted"]


def test_intervals_are_those_of_simulate_with_several_seeds(
    planned: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = planned["answer"]
    capsys.readouterr()
    main([*shlex.split(answer["simulate"])[1:], "--seeds", "2", "--json"])
    intervals = json.loads(capsys.readouterr().out)["uncertainty"]
    for name, latency in (("ttft_p99", "ttft_s"), ("tpot_p99", "tpot_s")):
        assert answer["slo"][name]["low_s"] == intervals[latency]["p99"]["low"]
        assert answer["slo"][name]["high_s"] == intervals[latency]["p99"]["high"]


def test_head_room_is_bracketed_by_a_load_that_holds_and_one_that_breaks(planned: dict[str, Any], chat: Trace) -> None:
    answer, load = planned["answer"], planned["answer"]["load"]
    assert load["holds_at"] == pytest.approx(1 + answer["headroom"])
    assert load["breaks_at"] / load["holds_at"] == pytest.approx(1.05)
    for scale, holds in ((load["holds_at"], True), (load["breaks_at"], False)):
        summary = played(answer, chat.scaled_rate(scale))
        assert (summary["ttft_s"]["p99"] <= 1 and summary["tpot_s"]["p99"] <= 0.03) is holds


def test_every_simulation_is_counted_and_quality_stands_beside(planned: dict[str, Any]) -> None:
    assert planned["simulations"] >= 4
    assert planned["first_answer"]["wall_s"] < planned["wall_s"]
    kinds = {row["kind"] for row in planned["sources"]}
    assert kinds <= {"measured", "fitted", "datasheet", "assumed"}
    by_policy = {row["policy"]: row["quality"] for row in planned["plans"]}
    assert by_policy["full"]["kl_nats"] == 0
    assert isinstance(by_policy["shadowkv"], dict)  # measured with a quarter of 8,128 tokens


def test_engines_are_named_where_they_have_the_policy(planned: dict[str, Any]) -> None:
    answer = planned["answer"]
    engines = answer["engines"]
    assert set(engines) == {"vLLM", "SGLang"}
    if answer["policy"] == "full":
        servers = engines["vLLM"]["commands"]
        assert sum(one["servers"] for one in servers) == answer["replicas"]
        for words in (shlex.split(one["command"]) for one in servers):
            assert words[words.index("--tensor-parallel-size") + 1] == str(answer["tp"])
            assert words[words.index("--max-num-seqs") + 1] == "256"
        assert answer["beside"] is None
    else:
        assert "has no policy" in engines["vLLM"]["why_not"]
        assert answer["beside"]["policy"] == "full"


def gpus(**options: Any) -> float:
    """GPUs of the answer for a short piece of chat; infinite where there is none."""
    found = plan(**{**CHAT, "limit": 100, **PLAIN, "tp": 1, **options})
    return math.inf if found.answer is None else found.answer["gpus"]


def test_more_load_and_a_tighter_slo_never_take_fewer_gpus() -> None:
    base = gpus()
    assert gpus(rate_scale=80.0) >= base
    assert gpus(slo="ttft_p99=10s,tpot_p99=200ms") <= base


def test_prices_scale_costs_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(f"{GPU}: {{usd_per_hour: 5.38, price_source: twice, price_date: 2026-01-31}}\n")
    one, two = (plan(**{**CHAT, "limit": 100, **PLAIN, "tp": 1, "prices": prices}) for prices in (None, file))
    assert one.answer is not None
    assert two.answer is not None
    assert two.answer["gpus"] == one.answer["gpus"]
    assert two.answer["cost_per_million_tokens"] == pytest.approx(2 * one.answer["cost_per_million_tokens"])
    assert two.answer["kwh_per_million_tokens"] is None  # the file knows no watts


def test_an_slo_that_nobody_meets_ends_with_3_and_the_nearest() -> None:
    code, document, _ = asked(["--gpu", GPU, "--no-pools", "--slo", "ttft_p99=1us", "--limit", "60"])
    assert code == 3
    assert document["answer"] is None
    assert document["nearest"]["slo"]["ttft_p99"]["value_s"] > 1e-6
    assert not any(row["feasible"] for row in document["plans"])
    assert document["sentence"].startswith("No candidate holds")


def test_what_cannot_hold_the_model_is_listed_with_the_reason() -> None:
    found = plan(**{**CHAT, **PLAIN, "model": "llama-3.1-70b", "gpu": [GPU], "limit": 30, "slo": "ttft_p99=60s"})
    (one,) = [row for row in found.plans if row["gpus"] is None and row["tp"] == 1]
    assert one["binding"] == "memory"
    assert "does not fit" in one["reason"]
    assert found.answer is not None
    assert found.answer["tp"] > 1


@pytest.mark.parametrize(
    ("further", "words"),
    [
        (["--gpu", "t4"], "has no price for GPU 't4'"),
        (["--gpu", GPU, "--slo", "ttft=1s"], "ttft_p99"),
        (["--gpu", GPU, "--slo", "gold:ttft_p99=1s"], "class or tenant of --slo 'gold'"),
        (["--gpu", "h100"], "did you mean 'h100-sxm'"),
        (["--gpu", GPU, "--prefill-gpus", "2"], "--prefill-gpus"),
        (["--gpu", GPU, "--quality", "pyproject.toml"], "is not JSON"),
        (["--gpu", GPU, "--gpus", "3", "--tp", "2"], "multiple"),
        ([], "gpu is missing"),
    ],
)
def test_bad_input_is_one_clear_line(further: list[str], words: str) -> None:
    code, document, error = asked(further)
    assert (code, document) == (2, {})
    assert words in error
    assert error.strip().count("\n") == 0 or "Usage" in error


@pytest.mark.parametrize(("price", "words"), [("-1", "greater than 0"), ("nan", "finite"), ("cheap", "valid number")])
def test_a_price_that_is_none_is_refused(price: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(f"{GPU}: {{usd_per_hour: {price}, price_source: mine, price_date: 2026-01-31}}\n")
    code, _, error = asked(["--gpu", GPU, "--prices", str(file)])
    assert code == 2
    assert f"{GPU}.usd_per_hour={price}" in error.replace("'", "")
    assert words in error


def test_an_interruption_prints_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Planner, "_verify", stop)
    code, document, error = asked(["--gpu", GPU, "--no-pools", "--limit", "60"])
    assert code == 130
    assert document["partial"]
    assert document["plans"]
    assert "interrupted" in error


def test_the_fleet_holds_on_every_seed() -> None:
    trace = "mooncake-conversation:spread_s=3"
    slo: Callable[[dict[str, Any]], bool] = lambda summary: summary["ttft_s"]["p90"] <= 4  # noqa: E731
    found = plan(trace=trace, limit=300, slo="ttft_p90=4s", seeds=3, prefix_cache_ddr=0, tp=1, **PLAIN)
    answer = found.answer
    assert answer is not None
    drawn = [traces.load(trace, limit=300, seed=seed) for seed in range(3)]
    assert all(slo(played(answer, one)) for one in drawn)
    bound = answer["slo"]["ttft_p90"]
    assert bound["low_s"] <= bound["value_s"] <= bound["high_s"]
    assert bound["value_s"] == pytest.approx(np.mean([played(answer, one)["ttft_s"]["p90"] for one in drawn]))
    if answer["fewer"] is not None:
        fewer = answer | {"gpus": answer["fewer"]["gpus"]}
        assert not all(slo(played(fewer, one)) for one in drawn)


def test_classes_have_bounds_of_their_own(tmp_path: Path) -> None:
    chat, bulk = even(0.05), even(0.05)
    both = Trace.from_columns(
        name="both",
        arrival_s=np.concatenate([chat.arrival_s, bulk.arrival_s]),
        prompt_tokens=np.concatenate([chat.prompt_tokens, bulk.prompt_tokens]),
        output_tokens=np.ones(2 * REQUESTS),
        tenant=np.repeat([0, 1], REQUESTS),
        tenants=("chat", "bulk"),
    )
    file = written(both, tmp_path)
    loose = plan(trace=file, slo="bulk:ttft_p99=1h", tp=1, **PLAIN).answer
    tight = plan(trace=file, slo="bulk:ttft_p99=1h,chat:ttft_p99=1s", tp=1, **PLAIN).answer
    assert loose is not None
    assert tight is not None
    assert loose["gpus"] == 1 < tight["gpus"]
    assert set(tight["slo"]) == {"bulk:ttft_p99", "chat:ttft_p99"}
    summary = played(tight, both)
    assert tight["slo"]["chat:ttft_p99"]["value_s"] == summary["tenants"]["chat"]["ttft_s"]["p99"]


def test_a_fleet_of_a_given_size_is_split_as_serves_best(chat: Trace) -> None:
    found = plan(**{**CHAT, "gpu": GPU, "model": MODEL, "gpus": 8})
    answer = found.answer
    assert answer is not None
    assert answer["gpus"] == 8
    held = answer["load"]["holds_at"]
    summary = played(answer, chat.scaled_rate(held))
    assert summary["ttft_s"]["p99"] <= 1
    assert summary["tpot_s"]["p99"] <= 0.03
    beyond = played(answer, chat.scaled_rate(answer["load"]["breaks_at"]))
    assert beyond["ttft_s"]["p99"] > 1 or beyond["tpot_s"]["p99"] > 0.03


def test_tenants_of_a_class_are_counted_by_its_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = Trace.from_columns(
        name="tenants",
        arrival_s=np.repeat(0.05 * np.arange(60), 2),
        prompt_tokens=np.full(120, 1024),
        output_tokens=np.full(120, 20),
        tenant=np.tile([0, 1], 60),
        tenants=("alice", "bob"),
    )
    file = tmp_path / "scenario.yaml"
    file.write_text("tenants: {alice: {slo_class: gold}}\nslo_classes: {gold: {ttft: 9s}}\n")
    found = plan(trace=written(trace, tmp_path), scenario=file, slo="gold:ttft_p99=200ms,bob:e2e_p99=1m", tp=1, **PLAIN)
    answer = found.answer
    assert answer is not None
    assert set(answer["slo"]) == {"gold:ttft_p99", "bob:e2e_p99"}
    assert "--slo-class gold:ttft=0.2s" in answer["simulate"]
    capsys.readouterr()
    assert main([*shlex.split(answer["simulate"])[1:], "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["tenants"]["alice"]["slo"] == {"ttft_s": 0.2}
    assert summary["tenants"]["alice"]["ttft_s"]["p99"] == answer["slo"]["gold:ttft_p99"]["value_s"]
    assert summary["goodput_rps"] == answer["goodput_rps"]
