"""`kvsim simulate` and `kvsim compare`: what they print and write, what they refuse, and how they end early."""

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import traces
from kvsim.__main__ import main
from kvsim.report import written
from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate
from kvsim.scenario.scenario_file import load_scenario
from traces.counts import Drawn, Recording

LONG = "mooncake-synthetic"  # prompts of up to 123,192 tokens, with block ids
BASE = ("--trace", "azure-2023-code", "--model", "llama-3.1-8b", "--gpu", "h100-sxm")
SMALL = (*BASE, "--limit", "60", "--gpus", "2")
TWO = ("--policy", "full", "--policy", "shadowkv:budget_tokens=1024")
CLOCKS = ("wall_s", "cpu_s", "setup_cpu_s")  # the only figures that may differ between two runs


def out_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Standard output of a command that must succeed and say nothing else."""
    code = main(args)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line of a command that must fail for bad input, without its newline."""
    code = main(args)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err.removesuffix("\n")


def without_clocks(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name not in CLOCKS}


def test_simulate_prints_the_summary_of_the_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(out_of(capsys, "simulate", *SMALL, "--slo", "ttft=2s,tpot=15ms", "--json"))
    asked = load_scenario({"trace": BASE[1], "model": BASE[3], "gpu": BASE[5], "limit": 60, "gpus": 2})
    (setup,) = asked.setups()
    expected = summarize(simulate(asked.load_trace(), setup), {"ttft_s": 2.0, "tpot_s": 0.015})
    assert printed["schema_version"] == 1
    assert (printed["inputs"]["policy"], printed["inputs"]["slo"]) == ("full", {"ttft_s": 2.0, "tpot_s": 0.015})
    for name in ("requests", "tokens", "ttft_s", "itl_s", "goodput_rps", "memory", "links", "makespan_s"):
        assert printed[name] == expected[name], name
    # Every token of the trace's head is served, and no request is lost.
    head = traces.load("azure-2023-code", limit=60)
    assert printed["requests"] == {"submitted": 60, "finished": 60, "rejected": 0, "timed_out": 0}
    assert printed["tokens"]["prompt"] == head.prompt_tokens.sum()
    assert printed["tokens"]["output"] == head.output_tokens.sum()


def test_seeds_give_the_mean_and_interval_of_their_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drawn = {"trace": "servegen-deepseek-r1:span_s=60", "model": BASE[3], "gpu": BASE[5], "limit": 30}
    options = [word for name, value in drawn.items() for word in (f"--{name}", str(value))]
    options += ["--seed", "5", "--seeds", "2", "--json", "--out", str(tmp_path)]
    together = json.loads(out_of(capsys, "simulate", *options))
    asked = [load_scenario({**drawn, "seed": seed}) for seed in (5, 6)]
    apart = [summarize(simulate(each.load_trace(), each.setups()[0])) for each in asked]
    found = together["uncertainty"]
    assert (found["seeds"], together["inputs"]["seed"], together["inputs"]["seeds"]) == ([5, 6], 5, 2)
    for figure, name, rank in (("output_tokens_per_s", None, None), (None, "ttft_s", "p99"), (None, "itl_s", "p50")):
        values = [run[figure] if figure else run[name][rank] for run in apart]
        interval = found[figure] if figure else found[name][rank]
        margin = 12.7062 * np.std(values, ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom
        assert interval["mean"] == pytest.approx(np.mean(values))
        assert (interval["low"], interval["high"]) == pytest.approx(
            (max(0.0, np.mean(values) - margin), np.mean(values) + margin)
        )
    of_the_first = {name: value for name, value in without_clocks(together).items() if name != "uncertainty"}
    assert of_the_first["ttft_s"] == apart[0]["ttft_s"]
    assert "Means and 95% confidence intervals" in (tmp_path / "report.html").read_text()


def test_a_window_is_written_in_full(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out_of(capsys, "simulate", *SMALL, "--perfetto", "500ms-0.52s", "--out", str(tmp_path))
    document = json.loads((tmp_path / "trace.perfetto.json").read_text())
    assert document["otherData"]["window_s"] == [0.5, 0.52]
    assert any(event["ph"] == "X" for event in document["traceEvents"])
    assert json.loads((tmp_path / "summary.json").read_text())["inputs"]["perfetto"] == [0.5, 0.52]
    message = error_of(capsys, "simulate", *SMALL, "--perfetto", "0s-1s")
    assert message == "error: perfetto=0-1 is written to trace.perfetto.json in the folder of --out; add --out DIR"


def test_figures_without_anything_to_see_are_warned_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["simulate", *SMALL, "--warmup", "1h", "--perfetto", "2h-3h", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    last_s = traces.load("azure-2023-code", limit=60).arrival_s[-1]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: warmup=3600s leaves no request for the latencies: the last arrives at {last_s:g} s",
        f"warning: nothing runs in the window of perfetto: the run goes from 0 s to {summary['makespan_s']:g} s",
    ]


def test_seeds_resample_a_recorded_trace(capsys: pytest.CaptureFixture[str]) -> None:
    once, again = (json.loads(out_of(capsys, "simulate", *SMALL, "--seeds", "2", "--json")) for _ in range(2))
    found = once["uncertainty"]
    assert found == again["uncertainty"]
    assert found["method"].startswith("percentile interval of a circular block bootstrap")
    for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s"):
        for rank in ("mean", "p50", "p99"):
            interval = found[name][rank]
            assert interval["mean"] == pytest.approx(once[name][rank])
            assert interval["low"] <= interval["mean"] <= interval["high"]
    assert found["output_tokens_per_s"]["mean"] == pytest.approx(once["output_tokens_per_s"])
    itl_s = found["itl_s"]["mean"]  # all gaps of a request are from its first token to its last
    assert itl_s["low"] < itl_s["mean"] < itl_s["high"]
    assert itl_s["mean"] == pytest.approx(once["itl_s"]["mean"])
    few = json.loads(out_of(capsys, "simulate", *SMALL, "--limit", "20", "--seeds", "2", "--json"))["uncertainty"]
    assert few["method"].startswith("none: the seed changes nothing in this trace")


def test_the_summary_has_every_name_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads(out_of(capsys, "simulate", *SMALL, "--trace", LONG, "--prefix-cache-ddr", "10GiB", "--json"))
    names = "inputs requests tokens makespan_s output_tokens_per_s goodput_rps ttft_s tpot_s itl_s e2e_s queue_s"
    names += " tenants memory links cache swaps bottleneck attribution uncertainty wall_s cpu_s setup_cpu_s"
    assert set(names.split()) <= set(summary)
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s"):
        assert set(summary[name]) == {"mean", "p50", "p90", "p99", "max"}
    assert set(summary["requests"]) == {"submitted", "finished", "rejected", "timed_out"}
    assert set(summary["tokens"]) == {"prompt", "output", "prompt_cached"}
    assert all({"capacity_bytes", "peak_bytes", "mean_bytes"} <= set(node) for node in summary["memory"].values())
    assert all({"bytes", "busy_s", "utilization"} <= set(link) for link in summary["links"].values())
    assert set(summary["swaps"]) == {"count", "bytes"}
    assert set(summary["preemptions"]) == {"count", "by_swap", "by_recomputation", "recomputed_tokens"}
    assert summary["cache"]["ddr"]["lookup_blocks"] > 0
    for name in ("limit", "rate_scale", "seed", "host", "gpus", "tp", "kv_dtype", "weight_dtype", "fidelity", "slo"):
        assert name in summary["inputs"], name


def test_simulate_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    out = out_of(capsys, "simulate", *SMALL, "--slo", "ttft=2s")
    assert "full: llama-3.1-8b on 2 x h100-sxm (serving, tp 1, host ddr5-dual-xeon)" in out
    assert "60 finished, 0 rejected" in out
    assert "with ttft <= 2 s" in out
    for row in ("TTFT", "TPOT", "ITL", "end to end", "queue", "HBM peak", "hbm->sm", "bottleneck"):
        assert row in out, row


def test_a_comparison_is_each_simulation_in_the_order_given(capsys: pytest.CaptureFixture[str]) -> None:
    runs = json.loads(out_of(capsys, "compare", *SMALL, *TWO[2:], *TWO[:2], "--json"))
    assert runs["schema_version"] == 1
    for run, policy in zip(runs["runs"], (TWO[3], TWO[1]), strict=True):
        alone = json.loads(out_of(capsys, "simulate", *SMALL, "--policy", policy, "--json"))
        assert alone["inputs"]["policy"] == policy
        assert without_clocks(run) == without_clocks(alone)


def test_compare_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    lines = out_of(capsys, "compare", *SMALL, *TWO).splitlines()
    assert lines[0].split()[:3] == ["policy", "finished", "rejected"]
    rows = [line.split() for line in lines[2:]]
    assert [row[:3] for row in rows] == [["full", "60", "0"], [TWO[3], "60", "0"]]
    assert rows[0][4] == "1.00x"


def test_what_timed_out_has_a_column_where_there_is_any(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    late = (
        "--trace",
        "servegen-deepseek-r1:span_s=20",
        *SMALL[2:],
        "--timeout",
        "40ms",
        "--tenant",
        "client-*:weight=2",
    )
    summary = json.loads(out_of(capsys, "simulate", *late, "--out", str(tmp_path), "--json"))
    counts = summary["requests"]
    assert counts["finished"] > 0
    assert counts["timed_out"] > 0
    lines = out_of(capsys, "compare", *late, "--policy", "full").splitlines()
    assert lines[0].split()[:5] == ["policy", "finished", "rejected", "timed", "out"]
    assert lines[2].split()[1:4] == [str(counts[name]) for name in ("finished", "rejected", "timed_out")]
    rows = [line.split() for line in out_of(capsys, "simulate", *late).splitlines() if line.startswith("client-")]
    shown = {row[0]: [int(count) for count in row[2:5]] for row in rows}
    own = {name: list(of["requests"].values())[1:] for name, of in summary["tenants"].items()}
    assert shown.items() <= own.items()
    assert any(row[2] for row in shown.values())
    assert "timed out" in (tmp_path / "report.html").read_text()


def test_two_runs_write_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        out_of(capsys, "compare", *SMALL, *TWO, "--out", str(tmp_path / name))
    first, second = tmp_path / "a", tmp_path / "b"
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    tables = {"requests.parquet", "series.parquet", "trace.perfetto.json"}
    assert {path.name for path in files} == {"summary.json", "report.html", *tables}
    for path in files:
        one, other = (first / path).read_bytes(), (second / path).read_bytes()
        if path.name in tables:
            assert one == other, path
        elif path.name == "summary.json":
            runs = [json.loads(text).get("runs", [json.loads(text)]) for text in (one, other)]
            assert [without_clocks(run) for run in runs[0]] == [without_clocks(run) for run in runs[1]]


def test_the_files_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    printed = json.loads(out_of(capsys, "simulate", *SMALL, "--out", str(out), "--json"))
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == printed
    assert parquet.read_table(out / "requests.parquet").num_rows == 60
    assert {path.name for path in out.iterdir()} == {
        "summary.json",
        "requests.parquet",
        "series.parquet",
        "trace.perfetto.json",
        "report.html",
    }


@pytest.mark.parametrize(
    ("flags", "links"),
    [
        ("--gpus 16 --prefill-gpus 8", {"nic"}),
        ("--gpus 4 --prefill-gpus 2", {"gpu->gpu"}),
        ("--gpus 16 --tp 4 --pp 4", {"nic", "gpu->gpu"}),
        ("--gpus 2 --prefix-cache-ddr 1GiB --prefix-cache-nvme 40GiB", {"hbm->ddr", "ddr->nvme"}),
        ("--gpus 2 --prefix-cache-ddr 1GiB --prefix-cache-remote 40GiB", {"hbm->ddr", "ddr->remote"}),
    ],
)
def test_the_page_shows_every_link(
    flags: str, links: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--trace", LONG, "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--limit", "20", *flags.split())
    summary = json.loads(out_of(capsys, "simulate", *args, "--out", str(tmp_path), "--json"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert links <= {name for name, figures in summary["links"].items() if figures["bytes"]}
    assert [name for name in links if escape(name) not in page] == []


def test_every_operation_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    small = (*BASE, "--limit", "5", "--policy", "offload-all", "--json")
    op, step = (json.loads(out_of(capsys, "simulate", *small, "--fidelity", x)) for x in ("op", "step"))
    assert op["requests"]["finished"] == 5
    assert op["tokens"] == step["tokens"]
    # One GPU has no rival for its links, so the two fidelities differ by what overlaps across layers alone.
    assert op["makespan_s"] == pytest.approx(step["makespan_s"], rel=0.1)


def test_rate_limit_and_seed(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: str) -> dict[str, Any]:
        return without_clocks(json.loads(out_of(capsys, "simulate", *SMALL, "--json", *args)))

    drawn = ("--trace", "servegen-deepseek-r1", "--limit", "0.02k")
    one, again, two = (run(*drawn, "--seed", seed) for seed in ("1", "1", "2"))
    assert one["requests"]["submitted"] == 20
    assert one == again
    assert one["tokens"] != two["tokens"]
    slow, fast = run("--rate-scale", "1e-3"), run("--rate-scale", "1000")
    assert slow["tokens"] == fast["tokens"]
    # At a thousandth of the rate each request has its replica to itself; at a thousand times they all queue.
    assert slow["queue_s"]["max"] == 0 < fast["queue_s"]["mean"]
    assert slow["makespan_s"] > fast["makespan_s"]


def test_flags_win_over_a_scenario_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(
        "trace: azure-2023-code\nmodel: llama-3.1-8b\ngpu: h100-sxm\ngpus: 4\nlimit: 500\n"
        "policy: [full, quest]\nslo: {ttft: 9s}\n",
        encoding="utf-8",
    )
    given = ("--scenario", str(path), "--limit", "20")
    runs = json.loads(out_of(capsys, "compare", *given, "--gpus", "2", "--json"))["runs"]
    assert [run["inputs"]["policy"] for run in runs] == ["full", "quest"]
    assert {run["inputs"]["gpus"] for run in runs} == {2}
    assert {run["requests"]["submitted"] for run in runs} == {20}
    assert runs[0]["inputs"]["slo"] == {"ttft_s": 9.0}
    assert "simulate takes one policy, not full, quest" in error_of(capsys, "simulate", *given)
    one = json.loads(out_of(capsys, "simulate", *given, "--policy", "snapkv", "--json"))
    assert (one["inputs"]["policy"], one["inputs"]["gpus"]) == ("snapkv", 4)


def test_counts_change_what_is_moved(capsys: pytest.CaptureFixture[str]) -> None:
    def moved(share: str) -> int:
        args = ("simulate", *SMALL, "--policy", "shadowkv", "--counts", f"miss={share}", "--json")
        return int(json.loads(out_of(capsys, *args))["links"]["ddr->hbm"]["bytes"])

    none, some, all_of_it = moved("0"), moved("0.5"), moved("1")
    assert none < some < all_of_it
    # What is fetched per missed chunk is linear in their number.
    assert some - none == pytest.approx(all_of_it - some, rel=0.01)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A run that missed 30 of 100 chunks."""
    steps = np.array([[0, 0, 9, 9, 9, 1]], dtype=np.int64)
    miss = Drawn(np.zeros(1, np.int64), np.array([[10, 20]], np.int64), np.full((1, 2), 50, np.int64))
    Recording(steps, {"miss": miss}).save(tmp_path / "run.npz")
    Recording(steps).save(tmp_path / "nothing.npz")
    return tmp_path / "run.npz"


@pytest.mark.parametrize("given", ["flag", "scenario"])
def test_a_recorded_run_gives_the_shares(recorded: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("compare", *SMALL, *TWO, "--json")
    typed = json.loads(out_of(capsys, *args, "--counts", "miss=0.3"))["runs"]
    if given == "flag":
        extra = ("--counts", str(recorded))
    else:
        (recorded.parent / "s.yaml").write_text(f"counts: {recorded}\n", encoding="utf-8")
        extra = ("--scenario", str(recorded.parent / "s.yaml"))
    measured = json.loads(out_of(capsys, *args, *extra))["runs"]
    assert [run["inputs"]["counts"] for run in measured] == [{"miss": 0.3}] * 2
    assert [without_clocks(run) for run in measured] == [without_clocks(run) for run in typed]


def test_a_recording_that_does_not_fit_is_refused(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, nothing = str(recorded), str(recorded.parent / "nothing.npz")
    error = error_of(capsys, "simulate", *SMALL, "--policy", "squeezed-attention", "--counts", run)
    assert error == "error: unknown count 'miss'; known: keep"
    assert "no count was drawn in this run" in error_of(capsys, "simulate", *SMALL, "--counts", nothing)
    error = error_of(capsys, "simulate", *SMALL, "--policy", "shadowkv", "--counts", run, "--counts", "keep=0.1")
    assert (
        error == f"error: --counts {run!r} is neither NAME=SHARE nor the one file of a recorded run, such as miss=0.4"
    )
    (recorded.parent / "s.yaml").write_text("counts: none.npz\n", encoding="utf-8")
    error = error_of(capsys, "simulate", *SMALL, "--scenario", str(recorded.parent / "s.yaml"))
    assert "counts='none.npz': none.npz: no such file; record one with" in error


def test_warnings_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--trace", LONG, "--limit", "10", "--gpu", "h100-sxm", "--json")
    assert main(["simulate", *base, "--model", "llama-3-8b"]) == 0
    out, err = capsys.readouterr()
    beyond = traces.load(LONG, limit=10)
    longest = int((beyond.prompt_tokens + beyond.output_tokens).max())
    assert f"the longest of {longest:,} tokens, are beyond the 8,192 positions of llama-3-8b" in err
    assert json.loads(out)["requests"]["rejected"] == 0


def test_a_cache_that_a_policy_cannot_use(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("simulate", *SMALL, "--trace", LONG, "--limit", "5", "--prefix-cache-ddr", "1GiB", "--json")
    assert main([*args, "--policy", "sink-window"]) == 0
    assert "warning: the prefix cache has no effect on sink-window" in capsys.readouterr().err
    out_of(capsys, *args, "--policy", "full")


def test_a_count_that_no_prompt_reaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,50,7\n", encoding="utf-8")
    args = ("simulate", "--trace", str(path), *BASE[2:], "--policy", "shadowkv", "--counts", "miss=0.4")
    assert main(args) == 0
    assert "warning: the count miss has no effect: no prompt of this trace is long" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["simulate", "compare"])
def test_an_interruption_leaves_whole_results(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def interrupting(_labels: Sequence[str], _requests: int) -> Iterator[Any]:
        pressed = []

        def show(left: Sequence[int]) -> None:
            if all(left) and not pressed:
                pressed.append(True)
                signal.raise_signal(signal.SIGINT)

        yield show

    monkeypatch.setattr("kvsim.cli.simulate_output.progress_bars", interrupting)
    policies = ("--policy", "full") * (2 if command == "compare" else 1)
    assert (
        main(
            [
                command,
                *BASE,
                "--trace",
                "mooncake-conversation",
                "--limit",
                "4k",
                "--gpus",
                "8",
                "--fidelity",
                "op",  # slow enough for both to be at work at a time
                *policies,
                "--out",
                str(tmp_path),
                "--json",
            ]
        )
        == 130
    )
    out, err = capsys.readouterr()
    assert err == "interrupted: these are the results so far\n"
    printed = json.loads(out)
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == printed
    for summary in printed.get("runs", [printed]):
        assert 0 < summary["requests"]["finished"] < summary["requests"]["submitted"] == 4000
    status = parquet.read_table(next(tmp_path.rglob("requests.parquet")))["status"].to_pylist()
    assert {"finished", "unfinished"} == set(status)


def test_an_interruption_while_results_are_written_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = written.report_html
    pressed: list[int] = []

    def press(*args: Any, **options: Any) -> str:
        for number in pressed:
            signal.raise_signal(number)
        return real(*args, **options)

    monkeypatch.setattr(written, "report_html", press)
    small = ["simulate", *BASE, "--limit", "3", "--out", str(tmp_path / "out"), "--json"]
    pressed.append(signal.SIGINT)
    assert main(small) == 130
    out, err = capsys.readouterr()
    assert err == "interrupted while the results were written: they are whole\n"
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(out)
    pressed.append(signal.SIGINT)  # once more, and the earlier results stay
    assert main([*small, "--policy", "quest"]) == 130
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Terminal(StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Terminal(), True), (StringIO(), False)])
def test_progress_is_shown_on_a_terminal_alone(
    stream: StringIO, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    assert main(["simulate", *SMALL, "--policy", "quest:budget_tokens=512", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"]["finished"] == 60
    assert ("quest:budget_tokens=512" in stream.getvalue()) is shown
    assert ("60/60" in stream.getvalue()) is shown


def test_preemptions_are_printed_where_there_are_any(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "preempt" not in out_of(capsys, "simulate", *SMALL)
    (tmp_path / "crowd.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "0,1000,900\n" * 10)
    crowded = ("--trace", str(tmp_path / "crowd.csv"), *BASE[2:], "--gpu-memory-utilization", "0.22")
    crowded += ("--preemption", "recompute")
    found = json.loads(out_of(capsys, "simulate", *crowded, "--json"))["preemptions"]
    assert found["count"] == found["by_recomputation"] > 0
    shown = f"{found['count']}: 0 by swap, {found['count']} by recomputation of {found['recomputed_tokens']:,} tokens"
    assert shown in out_of(capsys, "simulate", *crowded)
    assert "preempted" in out_of(capsys, "compare", *crowded, "--policy", "full")
