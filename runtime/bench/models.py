"""Models to time: of a shape, with random weights."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers


def random_model(name: str, config: Mapping[str, Any], device: str | None, dtype: str | None) -> Any:
    """A model of this config.json with random weights, bf16 by default: as fast as a trained one, good for nothing.

    It stands on a GPU unless `device` is cpu. Raises ValueError for a family that Transformers has not, and for a
    device or dtype that there is not.
    """
    asked = {key: value for key, value in config.items() if not key.startswith("_")}
    kind = asked.pop("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{name} is of the family {kind}, which Transformers {transformers.__version__} has not")
    torch.manual_seed(0)
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(
            "torch sees no GPU, where such a model is timed; with device cpu it runs on the processor, slowly"
        )
    where = torch.device(device or "cuda")
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if dtype is not None and dtype not in kinds:
        raise ValueError(f"dtype {dtype!r} is unknown; known are {', '.join(kinds)}")
    with where:
        made = transformers.CONFIG_MAPPING[kind](**asked)
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=kinds[dtype or "bf16"])
    return model.eval().requires_grad_(False)
