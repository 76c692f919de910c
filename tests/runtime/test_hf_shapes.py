"""Parameter counts of shapes read from configs against the models that Transformers builds from the same configs."""

import json
from importlib.resources import files

import pytest

from policies import hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CATALOGUE = files("kvsim") / "catalogue" / "models"
PYTHIA = {
    "model_type": "gpt_neox", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
    "vocab_size": 50304, "num_attention_heads": 8, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def config_of(name: str) -> dict:
    config = json.loads((CATALOGUE / f"{name}.json").read_text())
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize(
    "config",
    [
        config_of("nemotron-h-8b"),
        config_of("nemotron-3-nano-30b-a3b"),
        config_of("jamba-1.5-mini"),
        PYTHIA,
    ],
    ids=["nemotron-h-8b", "nemotron-3-nano-30b-a3b", "jamba-1.5-mini", "pythia-70m"],
)
def test_every_weight_is_counted(config: dict) -> None:
    given = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config["model_type"], **given)
        )
    assert hf.read(config, "m").params == sum(x.numel() for x in model.state_dict().values())
