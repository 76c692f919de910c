"""A tiny random model in a folder, for tests of commands and files."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers with 2 KV heads of 8, random weights, and the tokenizer that comes with needle-28m."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from runtime.needle.expand import PACKED

    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((PACKED / name).read_bytes())
    return folder
