"""Weights of a model that Transformers knows, counted on the meta device: nothing is loaded or downloaded."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from policies.hf.wrappers import unwrap
from policies.shown import shown

_KINDS = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


class Counted(NamedTuple):
    """Weights of a language model and of towers beside it, who counted them, and the keys that Transformers reads."""

    params: int
    other_params: int
    by: str
    keys: Mapping[str, Any]


def count_weights(config: Mapping[str, Any]) -> Counted:
    """Weights of the model that Transformers builds from a `config.json`, without any quantisation.

    A matrix that is tied counts once, a bias that balances experts as a weight. Raises ValueError for an architecture
    that Transformers does not have, and for a config of which it makes no model.
    """
    by = f"Transformers {transformers.__version__}"
    model_type: Any = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        model_type = unwrap(config, "the model").model_type  # the name by which Transformers may know it
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{by} has no architecture {shown(model_type)}; state the weights with --params, say 8e9")
    given = {
        key: value for key, value in config.items() if key not in ("model_type", "quantization_config", "auto_map")
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = CONFIG_MAPPING[model_type](**given)
            model = _build(settings)
    except Exception as error:  # noqa: BLE001 - whatever third-party code makes of a strange config is an answer
        raise ValueError(f"{by} makes no model of this config: {type(error).__name__}: {shown(str(error))}") from None
    total, text = _weights(model), settings.get_text_config(decoder=True)
    if text is settings:
        return Counted(total, 0, by, text.to_dict())
    language = _weights(nn.ModuleList([model.get_decoder(), model.get_output_embeddings() or nn.Identity()]))
    return Counted(language, total - language, by, text.to_dict())


def _build(settings: Any) -> Any:
    for kind in _KINDS:
        auto = getattr(transformers, kind, None)
        if auto is not None and type(settings) in auto._model_mapping:  # noqa: SLF001 - no public way to ask
            with torch.device("meta"):
                return auto.from_config(settings)
    raise ValueError(f"{settings.model_type} generates no text")


def _weights(model: nn.Module) -> int:
    biases = sum(x.numel() for name, x in model.named_buffers() if name.endswith(("correction_bias", "expert_bias")))
    return sum(x.numel() for x in model.parameters()) + biases
