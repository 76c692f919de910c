"""The shape of a loaded model, from the model: what its layers have shown, and the parameters of its modules."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from policies import ModelShape
from policies.model import LayerShape
from runtime.arena import DTYPES
from runtime.probe import SeenLayer

UNBOUNDED = 1 << 62  # positions of a model that has no table of them and states no limit (ALiBi)


def shape_of(model: Any, layers: Sequence[SeenLayer]) -> ModelShape:
    """The shape of a loaded model, in the dtype that it computes in; `layers` are those of its cache.

    Experts are counted as one MLP: the runtime plans memory and copies, and a model computes its own MLP. Raises
    ValueError for a dtype that the runtime cannot store.
    """
    dtype = next((name for name, known in DTYPES.items() if known == model.dtype), None)
    if dtype is None or not model.dtype.is_floating_point:
        raise ValueError(f"the runtime cannot store a cache of {model.dtype}; load the model in bf16, fp16 or fp32")
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding_params = _params(embedding)
    return ModelShape(
        name=config.model_type,
        hidden_dim=embedding.weight.shape[-1],
        vocab_size=embedding.weight.shape[0],
        max_positions=getattr(config, "max_position_embeddings", None) or UNBOUNDED,
        layers=tuple(_layer(model, index, seen, layers) for index, seen in enumerate(layers)),
        embedding_params=embedding_params,
        head_params=_params(head) if head is not None else embedding_params,
        params=_params(model),
        dtype=dtype,
        kv_dtype=dtype,
        weight_dtype=dtype,
    )


def _layer(model: Any, index: int, seen: SeenLayer, layers: Sequence[SeenLayer]) -> LayerShape:
    block = _block(model, index, layers)
    attention = model.get_submodule(seen.module) if seen.module else None
    of_block, of_attention = _params(block), _params(attention)
    mlp = max(0, of_block - of_attention)
    out = _params(_projections(attention)[-1]) if attention is not None and _projections(attention) else 0
    made = LayerShape(
        kind="full",
        heads=seen.heads,
        kv_heads=seen.kv_heads,
        head_dim=seen.head_dim,
        v_head_dim=seen.v_head_dim,
        qkv_params=of_attention - out,
        out_params=out,
        mlp_params=mlp,
        mlp_active_params=mlp,
    )
    if seen.kind == "sliding" or seen.shared:  # what others share stays in a cache of Hugging Face's: a window of all
        return replace(made, kind="sliding", window_tokens=seen.window_tokens or UNBOUNDED)
    if seen.kind == "linear":
        return replace(made, kind="linear", state_elements=max(1, seen.state_elements))
    return made


def _block(model: Any, index: int, layers: Sequence[SeenLayer]) -> nn.Module | None:
    """The decoder layer of a cache layer: the element of the list of layers in which its attention lies."""
    for other, seen in enumerate(layers):
        path = seen.module.split(".")
        if str(other) in path:
            name = ".".join([*path[: path.index(str(other))], str(index)])
            return dict(model.named_modules()).get(name)
    return None


def _projections(attention: nn.Module) -> list[nn.Module]:
    """The matrices of an attention module, the one to the hidden state last, as models define them."""
    return [m for m in attention.children() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]


def _params(module: nn.Module | None) -> int:
    return 0 if module is None else sum(weight.numel() for weight in module.parameters())
