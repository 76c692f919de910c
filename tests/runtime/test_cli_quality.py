"""`kvsim quality` on a tiny model and a text of words: figures against formulas written out, bytes against plans."""

import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvsim.__main__ import main  # noqa: E402
from traces.counts import Recording  # noqa: E402

WORDS = 700


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    generator = torch.Generator().manual_seed(3)
    letters = "abcdefgh"
    drawn = torch.randint(0, len(letters), (WORDS, 3), generator=generator).tolist()
    path.write_text(" ".join("".join(letters[i] for i in word) for word in drawn))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A random Llama of two layers, with a tokenizer that knows the words of the text and begins with a BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    where = tmp_path_factory.mktemp("model")
    words = sorted(set(text.read_text().split()))
    vocabulary = {word: i for i, word in enumerate(["<s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")  # noqa: S106
    fast.save_pretrained(where)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(where)
    return where


def asked(capsys: pytest.CaptureFixture[str], folder: Path, text: Path, *args: str) -> dict:
    given = ["quality", "--model", str(folder), "--text", str(text), "--device", "cpu", "--json", *args]
    assert main(given) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_exact_policies_lose_nothing_and_a_window_loses_what_the_formulas_say(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window = "sink-window:window_tokens=8,positions=original"
    given = ("--policy", "offload-all", "--policy", window, "--context", "60", "--new", "7", "--places", "3")
    report = asked(capsys, folder, text, *given)
    exact, lost = report["rows"]
    assert exact["kl_nats"]["mean"] < 1e-9
    assert exact["top1_share"] == {"mean": 1, "low": 1, "high": 1, "places": [1, 1, 1]}
    # Full attention again, by the stock model over the whole passage at once.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    words = tokenizer(text.read_text(), add_special_tokens=False).input_ids
    spare = len(words) - 59 - 7
    for place, start in enumerate((0, spare // 2, spare)):
        ids = torch.tensor([[0, *words[start : start + 66]]])
        with torch.no_grad():
            stock = torch.log_softmax(model(ids[:, :-1]).logits[0, -7:].double(), -1)
            # Each token sees 4 sinks and the 8 before it and itself; two layers: the mask is the model's own argument.
            seen = torch.ones(66, 66, dtype=torch.bool).tril() & (
                (torch.arange(66) < 4) | (torch.arange(66)[:, None] - torch.arange(66) < 8)
            )
            given = torch.where(seen, 0.0, -math.inf)[None, None]
            narrow = torch.log_softmax(model(ids[:, :-1], attention_mask=given).logits[0, -7:].double(), -1)
        kl = (stock.exp() * (stock - narrow)).sum(-1).mean()
        nll = (stock - narrow).gather(1, ids[0, -7:, None]).mean()
        assert lost["kl_nats"]["places"][place] == pytest.approx(float(kl), rel=1e-4)
        assert lost["nll_nats"]["places"][place] == pytest.approx(float(nll), abs=1e-5)
    assert lost["kl_nats"]["mean"] == pytest.approx(sum(lost["kl_nats"]["places"]) / 3)
    # Student's t with two degrees of freedom: 4.303 standard errors.
    values = torch.tensor(lost["kl_nats"]["places"], dtype=torch.float64)
    margin = 4.30265 * float(values.std()) / 3**0.5
    assert lost["kl_nats"]["high"] - lost["kl_nats"]["mean"] == pytest.approx(margin)
    assert lost["kl_nats"]["low"] == pytest.approx(max(0, lost["kl_nats"]["mean"] - margin))  # none is below 0
    assert 0 <= lost["top1_share"]["low"] <= lost["top1_share"]["high"] <= 1


def test_bytes_are_those_of_one_sequence(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = asked(capsys, folder, text, "--policy", "offload-all", "--context", "60", "--new", "5", "--places", "2")
    (row,) = report["rows"]
    token = 2 * 2 * 8 * 4  # key and value of 2 KV heads of 8 in fp32, of one layer
    assert row["held_bytes"]["ddr"] == 2 * (60 + 5) * token
    # Decoding feeds four tokens, which find 60 to 63: each comes up on both layers, and the new one goes down.
    assert row["moved_bytes_per_token"] == 2 * token * ((60 + 61 + 62 + 63) / 4 + 1)


def test_what_is_saved_is_what_is_printed_and_counts_are_recorded(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, page, counts = (tmp_path / name for name in ("q.json", "q.html", "q.npz"))
    policy = "shadowkv:budget_tokens=16,chunk_tokens=4,rank=8,outlier_chunks=1"
    wanted = ("--policy", policy, "--context", "100,60", "--new", "5", "--places", "1")
    written = ("--save", str(saved), "--page", str(page), "--counts-out", str(counts))
    report = asked(capsys, folder, text, *wanted, *written)
    assert json.loads(saved.read_text()) == report
    assert [row["context_tokens"] for row in report["rows"]] == [60, 100]
    assert report["rows"][0]["kl_nats"]["high"] is None  # one place has no interval
    assert Recording.load(counts).shares() == report["rows"][1]["counts"]
    assert {"miss"} == set(report["rows"][1]["counts"])
    html = page.read_text()
    assert "shadowkv:" in html
    assert "words.txt" in html
    assert main(["quality", "--model", str(folder), "--text", str(text), *wanted, "--device", "cpu"]) == 0
    assert "KL (nats)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--context", "4k"], "the text has 700 tokens, and a context of 4,000 with 128 that follow needs 4,127"),
        (["--context", "400", "--places", "9"], "at 9 places the same ones would be predicted twice"),
        (["--context", "500", "--new", "20"], "exceed the 512 positions of the model"),
        (["--context", "none"], "none"),
        (["--new", "0"], "--new '0' must be at least 1"),
        (
            ["--policy", "quest", "--counts-out", "x.npz"],
            "--counts-out takes the counts of one policy, and 2 are given",
        ),
        (["--save", "/"], "--save / is a folder"),
    ],
)
def test_bad_input_is_named(
    folder: Path, text: Path, args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = {"--context": "60", "--new": "128", "--places": "2"}
    given = [x for name, value in defaults.items() if name not in args for x in (name, value)]
    assert main(["quality", "--model", str(folder), "--text", str(text), "--policy", "full", *given, *args]) == 2
    assert says in capsys.readouterr().err


def test_logits_that_are_no_numbers_are_refused(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    where = folder.parent / "broken"
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(where)
    broken.save_pretrained(where)
    given = ["quality", "--model", str(where), "--text", str(text), "--policy", "full", "--context", "60", "--new", "5"]
    assert main([*given, "--places", "2", "--device", "cpu"]) == 2
    assert "the model's logits under full attention are not all numbers" in capsys.readouterr().err


def test_a_model_without_its_tokenizer_is_refused(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["quality", "--text", str(text), "--policy", "full", "--context", "60", "--new", "5", "--device", "cpu"]
    for file in folder.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main([*given, "--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path}: no tokenizer to load (")
    assert "Traceback" not in err
    (tmp_path / "tokenizer.json").write_text("{")  # there is one, but cut off
    assert main([*given, "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no tokenizer to load (")
