"""What a user may write wrong in files and options: one line that says which value, what holds, and what to do."""

from pathlib import Path

import pytest

from kvsim.__main__ import main

BASE = ("--trace", "azure-2023-code", "--model", "llama-3.1-8b", "--gpu", "h100-sxm")
TWO = ("--policy", "full", "--policy", "shadowkv:budget_tokens=1024")
TRACE = "mooncake-conversation"  # blocks of 512 tokens, which llama-3.1-8b keeps in 64 MiB; one tenant
SCENARIO = f"trace: {TRACE}\nlimit: 2\nmodel: llama-3.1-8b\ngpu: h100-sxm\n"
CACHE = "prefix_cache_ddr: 1GiB\n"


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line of a command that must fail for bad input, without its newline."""
    code = main(args)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err.removesuffix("\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schduler: fair\n", "FILE: unknown key 'schduler'; did you mean 'scheduler'?"),
        ("prefix_cache_dr: 1GiB\n", "FILE: unknown key 'prefix_cache_dr'; did you mean 'prefix_cache_ddr'?"),
        ("1: 2\n", "FILE: unknown key '1'; did you mean "),
        ("limit: 4\n", "FILE: the key 'limit' stands twice, in lines 2 and 5; keep one of them"),
        (
            "tenants: {default: {quota: 0.5, quota: 0.7}}\n",
            "FILE: the key 'quota' stands twice, in lines 5 and 5; keep one of them",
        ),
        (
            "tenants: {default: {wieght: 2}}\n",
            "FILE: tenants.default={'wieght': 2}: unknown key 'wieght'; did you mean 'weight'?",
        ),
        (
            "tenants: {default: {quota: 1.01}}\n",
            "FILE: tenants.default={'quota': 1.01}: quota=1.01 must be above 0 and",
        ),
        (f"{CACHE}prefix_cache_quota: 1.5\n", "FILE: prefix_cache_quota=1.5: prefix_cache_quota: 1.5 must be a share"),
        (
            f"{CACHE}prefix_cache_quota: {{default: 0.05}}\n",
            "prefix_cache_ddr: 0.05 of 1 GiB, a tenant's part of 51.2 MiB is smaller than one block of 64 MiB; make it",
        ),
        (
            f"{CACHE}prefix_cache_quota: {{defualt: 1}}\n",
            "unknown tenant of prefix_cache_quota 'defualt'; did you mean",
        ),
        *(
            (f"prefix_cache_{tier}: 50MiB\n", f"prefix_cache_{tier}: a tier of 50 MiB is smaller than one block of")
            for tier in ("hbm", "ddr", "nvme", "remote")
        ),
        ("slo_classes: {chat: {ttft: 1s}}\n", "no tenant has the SLO class 'chat'; give it to one, or leave it out"),
        (
            "slo_classes: {chat: {ttft: 1s}}\ntenants: {default: {weight: 2}, '*': {slo_class: chat}}\n",
            "no tenant has the SLO class 'chat': those that '*' matches have terms from a name or pattern before it;",
        ),
        ("tenants: {'x*': {slo_class: a}}\nslo_classes: {a: {ttft: 1s}}\n", "unknown tenant 'x*'; known: default"),
        ("timeout: 0\n", "FILE: timeout=0: Input should be greater than 0"),
        ("timeout_s: 3\n", "FILE: unknown key 'timeout_s'; did you mean 'timeout'?"),
        (
            "tenants: {default: {timeout: 0s}}\n",
            "FILE: tenants.default={'timeout': '0s'}: timeout=0 must be a finite time",
        ),
        ("gpus: [\n", "FILE is not YAML: while parsing"),
    ],
)
def test_a_scenario_file(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "scenario.yaml", tmp_path / "out"
    path.write_text(SCENARIO + text, encoding="utf-8")
    error = error_of(capsys, "simulate", "--scenario", str(path), "--out", str(out))
    assert error.startswith("error: " + message.replace("FILE", str(path)))
    assert not out.exists()


@pytest.mark.parametrize("option", ["--scenario", "--host", "--gpu", "--model"])
def test_a_file_that_is_no_text(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ("config.json" if option == "--model" else "file.yaml")
    path.write_bytes(b"gpus: 1\xff\n")
    args = ("simulate", "--trace", TRACE, "--model", "llama-3.1-8b", "--gpu", "h100-sxm", option, str(path))
    error = error_of(capsys, *args)
    assert error == f"error: {path} is not UTF-8 text (byte 7: invalid start byte); save it as UTF-8"


def test_a_merged_key_may_be_given_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML's own way to change what an anchor says is no key given twice: what is missing is said instead."""
    path = tmp_path / "scenario.yaml"
    path.write_text("tenants: {a: &a {weight: 2, quota: 0.5}, b: {<<: *a, quota: 1}}\n", encoding="utf-8")
    error = error_of(capsys, "simulate", "--scenario", str(path))
    assert error == f"error: {path}: trace is missing; model is missing; gpu is missing"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpus", "0"], "error: gpus=0 must be at least 1"),
        (["--gpus", "-3"], "error: gpus=-3 must be at least 1"),
        (["--gpus", "two"], "error: Invalid value for '--gpus': "),
        (["--gpus", "999999999999"], "error: command line: gpus=999999999999: Input should be less than or equal"),
        (["--gpus", "4", "--tp", "3"], "error: gpus=4 is not a multiple of tp=3"),
        (["--gpus", "16", "--tp", "16"], "error: tp=16 exceeds the 8 GPUs of host 'ddr5-dual-xeon'"),
        (["--rate-scale", "nan"], "error: command line: rate_scale=nan: Input should be a finite number"),
        (["--rate-scale", "-1"], "error: command line: rate_scale=-1.0: Input should be greater"),
        (["--limit", "0"], "error: limit=0: must be at least 1 request"),
        (["--limit", "-5"], "error: command line: limit='-5': token count '-5' is not a finite number"),
        (["--seed", "-1"], "error: command line: seed=-1: "),
        (["--seeds", "0"], "error: command line: seeds=0: Input should be greater than or equal to 1"),
        (["--perfetto", "10s"], "error: command line: perfetto='10s': '10s' is not a window of two times such as"),
        (["--perfetto", "2s-1s"], "error: perfetto=(2.0, 1.0): a window goes from one second to a later one"),
        (["--max-num-seqs", "0"], "error: max_num_seqs=0 must be at least 1"),
        (["--max-num-batched-tokens", "1e17"], "error: llama-3.1-8b does not fit: "),
        (["--gpu-memory-utilization", "0.1"], "error: llama-3.1-8b does not fit: one of 1 x h100-sxm has 7.918 GiB"),
        (["--gpu-memory-utilization", "inf"], "error: command line: gpu_memory_utilization=inf: "),
        (["--model", "llama-3.1-405b"], "error: llama-3.1-405b does not fit: "),
        (["--model", "llama-3.1-9b"], "error: unknown model 'llama-3.1-9b'; did you mean 'llama-3.1-8b'? known: "),
        (["--gpu", "h100-smx"], "error: unknown GPU 'h100-smx'; did you mean 'h100-sxm'? known: "),
        (["--gpu", "h100-sxm@mesured"], "error: unknown parameter set 'mesured'; did you mean 'measured'?"),
        (["--host", "ddr5"], "error: unknown host 'ddr5'"),
        (["--scheduler", "lifo"], "error: unknown scheduler 'lifo'"),
        (["--tenant", "a"], "error: --tenant 'a' must be written NAME:key=value,key=value"),
        (["--tenant", "a:weight"], "error: --tenant 'a:weight': 'weight' must be written key=value"),
        (["--tenant", "a:weight=1,weight=2"], "error: --tenant 'a:weight=1,weight=2' gives 'weight' twice"),
        (["--tenant", "a:quota=1", "--tenant", "a:weight=1"], "error: --tenant gives 'a' twice"),
        (["--tenant", "a:quota=1.5"], "error: command line: tenants.a={'quota': '1.5'}: quota=1.5 must be above 0 and"),
        (
            ["--tenant", "default:wait=1"],
            "error: command line: tenants.default={'wait': '1'}: unknown key 'wait'; did you",
        ),
        (["--tenant", "defualt:weight=1"], "error: unknown tenant 'defualt'; did you mean 'default'? known: default"),
        (["--tenant", "x*:weight=1"], "error: unknown tenant 'x*'; known: default"),
        (["--slo-class", "chat:ttft=1s"], "error: no tenant has the SLO class 'chat'"),
        (["--router", "rnd"], "error: unknown router 'rnd'"),
        (["--fidelity", "steps"], "error: unknown fidelity 'steps'; did you mean 'step'? known: step, op"),
        (["--preemption", "swapp"], "error: unknown preemption 'swapp'; did you mean 'swap'?"),
        (["--kv-dtype", "fp9"], "error: unknown dtype 'fp9'; known: "),
        (["--policy", "shadowvk"], "error: unknown policy 'shadowvk'; did you mean 'shadowkv'?"),
        (["--policy", "shadowkv:rnk=1"], "error: unknown parameter of shadowkv 'rnk'; did you mean 'rank'?"),
        (["--policy", "quest:budget_tokens=7"], "error: quest: budget_tokens=7 is not a multiple of page_tokens=16"),
        (["--policy", "no.such:Class"], "error: policy no.such:Class: cannot import 'no.such'"),
        (["--policy", "full@heads=2+sink-window@heads=2"], "error: head groups of 4 KV heads do not fit"),
        (["--counts", "miss"], "error: --counts 'miss' is neither NAME=SHARE nor the one file of a recorded run"),
        (["--counts", "none.npz"], "error: --counts 'none.npz' is neither NAME=SHARE nor the one file"),
        (["--counts", "miss=0.4,none.npz"], "error: --counts 'none.npz' is neither NAME=SHARE nor the one file"),
        (["--counts", "occupied"], "error: occupied: not a recording of counts ("),
        (["--counts", "miss=2"], "error: --counts 'miss=2': the share must be from 0 to 1"),
        (["--counts", "miss=nan"], "error: --counts 'miss=nan': the share must be from 0 to 1"),
        (["--counts", "a=1,a=1"], "error: --counts gives 'a' twice"),
        (["--counts", "mis=0.4", "--policy", "shadowkv"], "error: unknown count 'mis'; did you mean 'miss'? known: "),
        (["--slo", "ttft=0s"], "error: command line: slo.ttft='0s': Input should be greater than 0"),
        (["--slo", "p99=1s"], "error: command line: slo={'p99': '1s'}: unknown latency 'p99'"),
        (["--warmup", "-1s"], "error: command line: warmup='-1s': duration '-1s' is not a finite number"),
        (["--prefix-cache-hbm", "70GiB"], "error: llama-3.1-8b does not fit: "),
        (["--prefix-cache-ddr", "1XB"], "error: command line: prefix_cache_ddr='1XB': size '1XB' has the unknown unit"),
        (["--prefix-cache-nvme", "1PB"], "error: prefix_cache_nvme="),
        (["--prefix-cache-eviction", "lfru"], "error: unknown prefix_cache_eviction 'lfru'"),
        (["--trace", "mooncake"], "error: unknown trace 'mooncake'"),
        (["--trace", "no/such.csv"], "error: no/such.csv: no such file"),
        (["--prefix-cache-ddr", "1GiB"], "error: trace 'azure-2023-code' has no block"),
        (["--scenario", "missing.yaml"], "error: missing.yaml: No such file or directory"),
        (["--out", "occupied"], "error: occupied is a file; results need a folder"),
        (["--out", "occupied/below"], "error: occupied is a file; results need a folder"),
        (["--jsno"], "error: No such option: --jsno"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").write_text("precious", encoding="utf-8")
    policy = [] if "--policy" in args else ["--policy", "full"]
    command = "compare" if "--policy" in args or "--out" in args else "simulate"  # they share everything before the run
    out = [] if "--out" in args else ["--out", "new/out"]
    assert error_of(capsys, command, *BASE, "--limit", "2", *policy, *out, *args).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["occupied"]
    assert (tmp_path / "occupied").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n", "empty trace"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,7\n1,5\n", "bad.csv"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n0,-5,7\n", "num_prefill_tokens=-5"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\nnan,5,7\n", "arrived_at=nan"),
        ("when,what\n0,5\n", "missing column"),
    ],
)
def test_a_bad_trace(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    args = ("simulate", "--trace", str(path), *BASE[2:], "--out", str(tmp_path / "out"))
    assert message in error_of(capsys, *args)
    assert not (tmp_path / "out").exists()


def test_a_comparison_names_the_policy_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    bad = "full@heads=2+sink-window@heads=2"  # of 8 KV heads
    error = error_of(capsys, "compare", *BASE, "--policy", "full", "--policy", bad, "--out", str(out))
    assert error.startswith(f"error: policy {bad}: head groups of 4 KV heads do not fit")
    assert not out.exists()


def test_what_a_command_cannot_do_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, "simulate") == "error: command line: trace is missing; model is missing; gpu is missing"
    assert error_of(capsys, "compare", *BASE).startswith("error: compare needs policies: name each with --policy")
    assert error_of(capsys, "simulate", *BASE, *TWO).startswith("error: simulate takes one policy, not full, shad")
