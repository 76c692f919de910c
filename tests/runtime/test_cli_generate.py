"""`kvsim generate` and `kvsim model needle`: text, figures, recordings, and how a run ends early."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from kvsim.__main__ import main  # noqa: E402
from kvsim.cli import generate as command  # noqa: E402
from policies import parse_policy  # noqa: E402
from runtime import Offload, offload  # noqa: E402
from runtime.loading import load_model  # noqa: E402
from traces.counts import Recording  # noqa: E402

QUESTION = "Remember: the magic number is 4821. What is the magic number? The magic number is"
TOKENS = 23  # of the question


@pytest.fixture
def question(tmp_path: Path) -> Path:
    path = tmp_path / "question.txt"
    path.write_text(QUESTION, encoding="utf-8")
    return path


def report(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main(["generate", *args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    printed: dict = json.loads(out)
    return printed


def test_the_shipped_model_answers(question: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt-file", str(question), "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    answer, _, figures = out.partition("\n")
    assert (answer, err) == (" 4821", "")
    assert "full: needle-28m in fp32 on " in figures
    for name in ("prompt", "output", "TTFT", "TPOT p50", "held in hbm"):
        assert f"\n  {name} " in figures, name


def test_captured_steps_are_told(tiny_llama: Path, question: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--model", str(tiny_llama), "--prompt-file", str(question), "--max-new-tokens", "6", "--device", "cpu")
    plain, captured = (report(capsys, *args, *more) for more in ((), ("--capture",)))
    assert plain["tokens"] == captured["tokens"]
    assert plain["eager_steps"] == captured["eager_steps"] == {}
    assert captured["replayed_steps"] == 0  # there are no graphs on a CPU
    assert main(["generate", *args, "--capture", "--policy", "offload-all"]) == 0
    out, _ = capsys.readouterr()
    assert "5 not captured  offload-all takes lengths from the host in its decode steps" in out


def test_figures_and_recording(
    tiny_llama: Path, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = tmp_path / "run.npz"
    args = ("--model", str(tiny_llama), "--prompt-file", str(question), "--policy", "offload-all")
    said = report(capsys, *args, "--max-new-tokens", "6", "--counts-out", str(counts))
    assert (said["prompt_tokens"], said["output_tokens"], len(said["tokens"])) == (TOKENS, 6, 6)
    # Keys and values of 2 heads of 8 fp32 numbers: 128 bytes a token and layer. Room for the prompt and 6 tokens; down
    # go the prompt and 5 tokens that are fed back, up comes at each of those steps what was there before.
    assert said["held_bytes"] == {"ddr": 3 * 128 * (TOKENS + 6), "hbm": 2 * 128 * (TOKENS + 6)}
    fetched = sum(TOKENS + i for i in range(5))
    assert said["moved_bytes"] == {"hbm->ddr": 3 * 128 * (TOKENS + 5), "ddr->hbm": 3 * 128 * fetched}
    assert said["ttft_s"] > 0 < said["tpot_s"]
    steps = Recording.load(counts).steps
    assert len(steps) == 3 * 6  # layers, and steps of each: the prompt and five tokens
    in_chunks = report(capsys, *args, "--max-new-tokens", "6", "--prefill-chunk", "9")
    assert in_chunks["text"] == said["text"]
    # The second chunk brings back the first 9 tokens, the third 18.
    assert in_chunks["moved_bytes"]["ddr->hbm"] == 3 * 128 * (fetched + 9 + 18)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder; name a file in it"),
        ("none/run.npz", "No such file or directory; name a file in a folder that takes one"),
        ("prompt.txt/run.npz", "Not a directory; name a file in a folder that takes one"),
    ],
)
def test_a_recording_that_could_not_be_written_is_refused_first(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("a b c")
    args = ("--prompt-file", str(tmp_path / "prompt.txt"), "--model", "none", "--counts-out", str(tmp_path / name))
    assert main(["generate", *args]) == 2  # before the model is looked for, which there is none of
    err = capsys.readouterr().err
    assert err.startswith(f"error: --counts-out {tmp_path / name}")
    assert err.endswith(f"{message}\n")


def test_what_a_group_reads_together(
    tiny_llama: Path, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each head chooses one page, and the last is read anyway: a group of two heads reads one or two more."""
    counts, options = tmp_path / "run.npz", "page_tokens=4,budget_tokens=8,dense_layers=0,sink_tokens=0"
    args = ("--model", str(tiny_llama), "--prompt-file", str(question), "--max-new-tokens", "6")
    own = (*args, "--policy", f"quest:{options},per=query_head")
    said = report(capsys, *own, "--counts-out", str(counts))
    added = Recording.load(counts).counts["added"].value
    assert added.shape == (3 * 5, 2)  # layers x steps that choose, KV heads
    assert said["union_factor"] == pytest.approx(1 + added.sum() / added.size)
    assert 1 < said["union_factor"] < 2
    assert main(["generate", *own]) == 0
    assert f"{said['union_factor']:.2f} times the pages that one head chooses\n" in capsys.readouterr().out
    assert report(capsys, *args, "--policy", f"quest:{options}")["union_factor"] is None


def test_one_token_has_no_time_between(tiny_llama: Path, question: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--model", str(tiny_llama), "--prompt-file", str(question), "--max-new-tokens", "1")
    assert report(capsys, *args)["tpot_s"] is None
    assert main(["generate", *args]) == 0
    assert "TPOT p50     -\n" in capsys.readouterr().out


class Terminal(StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Terminal(), True), (StringIO(), False)])
def test_progress_is_shown_on_a_terminal_alone(
    tiny_llama: Path, question: Path, stream: StringIO, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    args = ("--model", str(tiny_llama), "--prompt-file", str(question), "--max-new-tokens", "2", "--prefill-chunk", "5")
    assert main(["generate", *args]) == 0
    assert ("prompt and index" in stream.getvalue()) is shown
    assert ("100%" in stream.getvalue()) is shown


def test_ctrl_c_during_the_prompt(
    tiny_llama: Path, question: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told, offloads = [], []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored

    @contextmanager
    def interrupting(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
        def show(done: int) -> None:
            told.append(done)
            signal.raise_signal(signal.SIGINT)

        yield show

    init = Offload.__init__
    monkeypatch.setattr(
        Offload, "__init__", lambda self, *args, **given: (offloads.append(self), init(self, *args, **given))[1]
    )
    monkeypatch.setattr(command, "progress_bar", interrupting)
    args = ["generate", "--model", str(tiny_llama), "--prompt-file", str(question), "--policy", "offload-all"]
    try:
        assert main(args) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out == ""
    assert told == [TOKENS // 3]  # the first of three layers has done the prompt
    (kv,) = offloads
    assert not kv.footprint.now_bytes
    assert kv.model.config._attn_implementation == "sdpa"
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(kv.model(ids).logits, load_model(tiny_llama, "cpu")(ids).logits)


def test_memory_that_is_not_there(
    tiny_llama: Path, question: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runtime.memory.free_host_bytes", lambda: 1000)
    assert main(["generate", "--model", str(tiny_llama), "--prompt-file", str(question), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(
        f"error: the cache needs {3 * 128 * (TOKENS + 128):,} bytes of host memory and 1,000 are free"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt-file", "none.txt"], "none.txt: No such file or directory"),
        (["--prompt-file", "empty.txt"], "the prompt is empty; give it at least one token"),
        (["--prompt-file", "binary.txt"], "binary.txt is not UTF-8 text (byte 0: "),
        (["--prompt-file", "long.txt"], "exceed the 2048 positions of llama; cut the prompt"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--prefill-chunk", "-1"], "token count '-1' is not a finite number"),
        (["--policy", "qwest"], "unknown policy 'qwest'; did you mean 'quest'?"),
        (["--policy", "quest:per=query_head,page_tokens=0"], "quest: page_tokens=0 must be at least 1"),
        (
            ["--model", "empty"],
            "empty: no folder with a config.json or one GGUF file; name a model's folder, or needle-28m",
        ),
        (["--model", "pickled"], "pickled: no model to load ("),
        (["--dtype", "bf17"], "dtype 'bf17' is unknown; the runtime computes in fp32, bf16, fp16"),
    ],
)
def test_bad_input_is_one_line(
    tiny_llama: Path,
    tmp_path: Path,
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {"q": b"question", "empty": b"", "binary": b"\xff\xfe", "long": b"many words " * 2048}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "pickled").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "pickled" / name).write_bytes((tiny_llama / name).read_bytes())
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    given = ["--prompt-file", "q.txt", "--model", str(tiny_llama)]
    assert main(["generate", *given, *args]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_needle_is_unpacked(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second time it is there
        assert main(["model", "needle", str(tmp_path / "needle")]) == 0
        assert capsys.readouterr().out == f"needle-28m is in {tmp_path / 'needle'}\n"
    assert len(load_file(tmp_path / "needle" / "model.safetensors")) == 2 + 8 * 9
    assert main(["model", "needle", str(tiny_llama)]) == 2
    assert capsys.readouterr().err == f"error: dest={tiny_llama} has another model in it; name a folder that has none\n"


def test_a_model_is_loaded_in_the_dtype_that_is_asked_for(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "cpu", "bf16")
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    with offload(model, parse_policy("full")) as kv:
        assert kv.shape.kv_dtype == "bf16"
