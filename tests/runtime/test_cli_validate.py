"""`kvsim validate --bytes`: every policy that is executed stands in the table, and a byte too much is noticed."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvsim.__main__ import main  # noqa: E402
from policies import POLICIES, Full  # noqa: E402
from runtime import Method  # noqa: E402
from runtime.methods.full import method as full  # noqa: E402

SMALL = ("--prompt", "260", "--new", "5")


def table(capsys: pytest.CaptureFixture[str], code: int, *args: str) -> list[dict]:
    assert main(["validate", "--bytes", *args, "--json"]) == code
    rows: list[dict] = json.loads(capsys.readouterr().out)["policies"]
    return rows


def test_all_policies_that_are_executed_agree(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(capsys, 0, *SMALL, "--model", str(tiny_llama))
    assert [row["policy"] for row in rows if not row["agree"]] == []
    executed = {name for name in POLICIES if find_spec(f"runtime.methods.{name.replace('-', '_')}")}
    assert {row["policy"].partition(":")[0].partition("@")[0] for row in rows} == executed
    for row in rows:
        assert sum(said["runtime"] for said in row["held_bytes"].values()) > 0
        assert row["elsewhere_bytes"] == {}
        for said in row["moved_bytes"].values():
            assert said["runtime"] == said["kvsim"] == said["audit"] > 0


def test_its_numbers_are_those_counted_by_hand(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--model", str(tiny_llama), "--prompt", "100", "--new", "5", "--batch", "3", "--policy", "offload-all")
    (row,) = table(capsys, 0, *args)
    # A token's keys and values on one layer: 2 x 2 heads x 8 x 4 bytes = 128, for 3 sequences on 3 layers. The prompt
    # and four tokens go down; before each of the four all earlier ones come up. Two staging buffers serve all layers.
    token = 3 * 128
    assert row["moved_bytes"]["hbm->ddr"]["audit"] == 3 * token * 104
    assert row["moved_bytes"]["ddr->hbm"]["audit"] == 3 * token * (100 + 101 + 102 + 103)
    assert row["held_bytes"]["ddr"]["runtime"] == 3 * token * 105
    assert row["held_bytes"]["hbm"]["runtime"] == 2 * token * 105


@dataclass(frozen=True, slots=True, kw_only=True)
class Careless(Full):
    """Says that it is a dense cache, and reads host memory on the side."""

    name: ClassVar[str] = "careless"
    breaks: bool = False


def method(policy: Careless) -> Method:
    honest = full(policy)

    def append(call) -> None:
        honest.kernels["append"](call)
        if policy.breaks:
            raise RuntimeError("append has lost its way")
        torch.add(call.state["kv"], HOST[0])

    return Method(kernels={**honest.kernels, "append": append}, extends=True)


HOST: list = []


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every arena hold one tensor in host memory that no plan knows."""
    from policies.plan import Tier
    from runtime.arena import Arena

    HOST[:] = [torch.zeros(1)]
    held = Arena.held
    monkeypatch.setattr(Arena, "held", lambda self: [*held(self), (Tier.DDR, HOST[0])])


def test_what_a_plan_does_not_say_is_noticed(tiny_llama: Path, host: None, capsys: pytest.CaptureFixture[str]) -> None:
    here = f"{__name__}:Careless"
    args = ("--model", str(tiny_llama), "--prompt", "20", "--new", "3", "--policy", "full", "--policy")
    rows = table(capsys, 3, *args, here)
    # Three layers, the prompt and two tokens fed back.
    assert [row["faults"] for row in rows] == [[], ["aten.add.Tensor mixed both tiers 9 times"]]
    rows = table(capsys, 3, *args, f"{here}:breaks=true")
    assert rows[1]["faults"] == ["failed: append has lost its way"]
    assert main(["validate", "--bytes", *args, f"{here}:breaks=true"]) == 3
    out, err = capsys.readouterr()
    assert err == f"error: bytes disagree under 1 of 2 policies: {here}:breaks=true\n"
    first, second = (line for line in out.splitlines() if "full" in line or "Careless" in line)
    assert first.rstrip().endswith("yes")
    assert second.rstrip().endswith("failed: append has lost its way")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "say what to validate: --bytes"),
        (["--bytes", "--new", "0"], "--new 0 must be at least 1"),
        (["--bytes", "--prompt", "3x"], "token count '3x' has the unknown unit 'x'"),
        (["--bytes", "--model", "no/where"], "no config.json of 'no/where' is in the Hugging Face cache"),
        (["--bytes", "--policy", "shadowvk"], "unknown policy 'shadowvk'; did you mean 'shadowkv'?"),
        (["--bytes", "--dtype", "int8"], "dtype 'int8' is unknown; the runtime computes in fp32, bf16, fp16"),
        (["--bytes", "--device", "cuda:99"], "device 'cuda:99' is not there: PyTorch sees"),
        (["--bytes", "--device", "tpu"], "device 'tpu' must be cpu, cuda or cuda:N"),
    ],
)
def test_bad_input_is_one_line(
    tiny_llama: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in args else ["--model", str(tiny_llama)]
    assert main(["validate", *model, *args]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {message}")


def test_without_torch_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvsim.cli import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "torch" else object())
    for command in (["validate", "--bytes"], ["generate", "--prompt-file", __file__], ["model", "needle", "x"]):
        assert main(command) == 2
        assert capsys.readouterr().err.endswith("needs torch: pip install 'kvsim[runtime]'\n")


def test_a_policy_from_outside_needs_a_method(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(globals(), "method")
    assert main(["validate", "--bytes", "--model", str(tiny_llama), "--policy", f"{__name__}:Careless"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"which returns a runtime.Method; module {__name__!r} of careless has none" in err
