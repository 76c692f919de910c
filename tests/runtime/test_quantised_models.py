"""Models that come quantised: the runtime needs their KV shapes, whatever their weights were stored in."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvsim.__main__ import main  # noqa: E402
from policies import parse_policy  # noqa: E402
from runtime import loading, offload  # noqa: E402


def test_a_config_that_names_a_quantisation_is_no_hindrance(tiny_llama: Path) -> None:
    """Transformers leaves it in the config of a model that it has turned back, as from a GGUF file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    model.config.quantization_config = {"quant_method": "gguf"}
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=9, do_sample=False)
        with offload(model, parse_policy("offload-all"), max_new_tokens=9) as kv:
            assert torch.equal(
                model.generate(ids, past_key_values=kv.cache(), max_new_tokens=9, do_sample=False), expected
            )


def test_a_gguf_file_says_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("a b c")
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert main(["generate", "--model", str(folder), "--prompt-file", str(tmp_path / "prompt.txt")]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {folder / 'model.gguf'} needs gguf and accelerate to be read: pip install 'kvsim[real]'\n"
    (folder / "other.gguf").write_bytes(b"GGUF")  # which of them?
    assert main(["generate", "--model", str(folder), "--prompt-file", str(tmp_path / "prompt.txt")]) == 2
    assert "no folder with a config.json or one GGUF file" in capsys.readouterr().err
