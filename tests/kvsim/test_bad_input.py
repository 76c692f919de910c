"""What a user may write wrong in files and options: one line that says which value, what holds, and what to do."""

from pathlib import Path

import pytest

from kvsim.__main__ import main

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
