"""From a Hugging Face `config.json` to a ModelShape: which layers an architecture has, and how each is made."""

from collections.abc import Mapping
from typing import Any

from policies.hf.attention import attention, mla
from policies.hf.defaults import defaults_of
from policies.hf.families import FAMILIES
from policies.hf.family import Family, decided, layer_norms, norm_params
from policies.hf.keys import Keys, check_kinds
from policies.hf.mixers import MIXERS
from policies.hf.mlps import dense_mlp, layer, sparse_mlp
from policies.hf.per_layer import number_at, per_layer
from policies.hf.quantised import as_stored
from policies.hf.rules import KIND_OF_LAYER_TYPE
from policies.hf.stated import STATED, stated_layers
from policies.hf.towers import count_towers
from policies.hf.wrappers import unwrap
from policies.model import LayerShape, ModelShape
from policies.shown import shown

SERVED_IN_HALF = "the checkpoint is in fp32, and is taken to be served in bf16; --weight-dtype fp32 leaves it as it is"

# What a config.json has to say itself; only one inside a wrapper leaves out what its class has as default.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ESSENTIAL = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def read(config: Mapping[str, Any], name: str, *, params: int | None = None, counted_by: str = "") -> ModelShape:
    """The shape of the language model that `config` describes, inside whatever wrapper; see `policies.hf.families`.

    Weights, cached keys and values have the config's dtype, bf16 when it names none or fp32; what a quantised
    checkpoint converts has the types of its scheme. Weights of vision and audio towers and of layers for multi-token
    prediction are counted apart. `params` states the weights of an architecture that the table of families lacks.

    Raises ValueError for a missing key, a value out of range, or an architecture that is not known.
    """
    check_kinds(config, name)
    inner = unwrap(config, name)
    model_type = inner.model_type
    family = FAMILIES.get(model_type)
    if family is None and params is None:
        raise ValueError(
            f"config of {shown(name)}: model_type {shown(model_type)} is not in the table of families, and its weights "
            "are not guessed; state them with --params, say --params 8e9 (kvsim model show --exact counts them where "
            "Transformers knows the architecture)"
        )
    if family is not None and params is not None:
        raise ValueError(
            f"--params {params:,} is of no use: the weights of a {model_type} model are counted; leave it out"
        )
    keys = make_keys(inner.config, name, model_type, family or STATED, nested=inner.nested)
    source = f"family table: {model_type}"
    if family is None:
        how = f"counted by {counted_by}" if counted_by else "stated by --params"
        source = f"{how}; keys and values as the config of a {shown(model_type)} has them"
        family, layers = STATED, stated_layers(keys, params or 0)
    elif family.layers:
        layers = family.layers(keys, family)
    else:
        kinds = _layer_kinds(keys, family, model_type)
        layers = tuple(_layer(keys, family, index, kind) for index, kind in enumerate(kinds))
    shape = _assemble(keys, family, name, layers, params, source, inner.outer)
    return as_stored(shape, keys, model_type, family)


def make_keys(config: Mapping[str, Any], name: str, model_type: str, family: Family, *, nested: bool) -> Keys:
    """The keys of a language model's config under their common names, with the defaults of its class."""
    if family.adapt:
        try:
            config = family.adapt(config)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"config of {shown(name)}: its keys are not as {model_type} has them: {error}") from None
    common = {family.aliases.get(key, key): value for key, value in config.items() if key in family.aliases}
    common |= {key: value for key, value in config.items() if key not in family.aliases and value is not None}
    count = family.experts.count if family.experts else ""
    if count and count not in common:  # Transformers 5 writes other names than the published files
        given = next((name for name in _EXPERT_COUNTS if name in common), count)
        common |= {count: common[given]} if given in common else {}
    renamed = {family.aliases.get(key, key): value for key, value in defaults_of(model_type).items()}
    defaults = {
        key: value
        for key, value in {**renamed, **family.defaults}.items()
        if key not in config and key not in common and (nested or key not in _ESSENTIAL)
    }
    return Keys(common, name, defaults)


def _assemble(
    keys: Keys,
    family: Family,
    name: str,
    layers: tuple[LayerShape, ...],
    params: int | None,
    source: str,
    outer: Mapping[str, Any],
) -> ModelShape:
    hidden, vocab = keys.number("hidden_size"), keys.number("vocab_size")
    matrix = vocab * (keys.number(family.embedding, hidden) if family.embedding else hidden)
    bias = vocab if decided(keys, family.head_bias) else 0
    in_layers = sum(x.qkv_params + x.out_params + x.mlp_params for x in layers)
    outside = family.last_norms * norm_params(keys, family) + (family.outside(keys) if family.outside else 0)
    tied = keys.flag("tie_word_embeddings", False)
    counted = in_layers + outside + matrix * (1 if tied else 2) + bias
    other, notes = count_towers(outer, hidden)
    dtype = keys.dtype()
    if dtype == "fp32":
        dtype, notes = "bf16", (*notes, SERVED_IN_HALF)
    return ModelShape(
        name=name,
        hidden_dim=hidden,
        vocab_size=vocab,
        max_positions=keys.number("max_position_embeddings"),
        layers=layers,
        embedding_params=matrix,
        head_params=matrix,
        params=params or counted,
        dtype=dtype,
        kv_dtype=dtype,
        weight_dtype=dtype,
        other_params=other,
        predictor_params=_predictor_params(keys, layers),
        tied_head=tied,
        source=source,
        notes=notes,
    )


def _predictor_params(keys: Keys, layers: tuple[LayerShape, ...]) -> int:
    """Weights of layers for multi-token prediction: each is as the last, with a projection of two inputs and norms."""
    hidden, last = keys.number("hidden_size"), layers[-1]
    count = sum(keys.number(key, 0, least=0) for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers"))
    return count * (last.qkv_params + last.out_params + last.mlp_params + 2 * hidden * hidden + 3 * hidden)


def _layer_kinds(keys: Keys, family: Family, model_type: str) -> list[str]:
    """`full`, `sliding` or `linear` for each layer."""
    kinds = []
    for layer_type in per_layer(keys, "layer_types"):
        kind = KIND_OF_LAYER_TYPE.get(layer_type) if isinstance(layer_type, str) else None
        if kind is None:
            known = ", ".join(KIND_OF_LAYER_TYPE)
            raise keys.error("layer_types", f"has {shown(layer_type)}; known: {known}")
        kinds.append(kind)
    if not kinds:
        kinds = [_kind_by_rule(keys, family, index) for index in range(keys.number("num_hidden_layers"))]
    if "linear" in kinds and not family.linear:
        raise keys.error("layer_types", f"has linear layers, which {model_type!r} models do not have")
    return kinds


def _kind_by_rule(keys: Keys, family: Family, index: int) -> str:
    """The kind of a layer whose config has no `layer_types`: each architecture has its rule."""
    if family.kinds:
        return family.kinds(keys, index)
    return "sliding" if family.window in keys else "full"


def _layer(keys: Keys, family: Family, index: int, kind: str) -> LayerShape:
    hidden = keys.number("hidden_size")
    if kind == "linear":
        first = MIXERS[family.linear](keys)
    elif family.attention == "mla":
        first = mla(keys, family, index)
    else:
        first = attention(keys, family, kind, index)
        if family.indexed and family.indexed(keys, index):
            first |= _index_beside(keys, first)
        if family.beside:
            mixer = MIXERS[family.beside](keys)
            added = {key: first[key] + mixer[key] for key in ("qkv_params", "out_params")}
            first |= {**added, "state_elements": mixer["state_elements"]}
    first["qkv_params"] += family.further(keys) if family.further else 0
    if family.experts and _is_sparse(keys, family, index):
        second = sparse_mlp(keys, family, family.experts, index)
    elif family.width:
        width = number_at(keys, family.width, index, family.wide * hidden or None)
        second = dense_mlp(keys, family, width)
    else:
        second = {"mlp_params": 0, "mlp_active_params": 0}
    return layer({**first, **second}, layer_norms(keys, family) * norm_params(keys, family))


def _index_beside(keys: Keys, parts: Mapping[str, Any]) -> dict[str, int]:
    """MiniMax-M3's indexer of blocks: queries of its own heads, and one key a token; both normed."""
    hidden, heads, dim = keys.number("hidden_size"), keys.number("index_n_heads"), keys.number("index_head_dim")
    added = hidden * (heads + 1) * dim + 2 * dim
    chosen = keys.number("index_topk_blocks") * keys.number("index_block_size")
    return {"index_dim": dim, "index_heads": heads, "index_topk": chosen, "qkv_params": parts["qkv_params"] + added}


def _is_sparse(keys: Keys, family: Family, index: int) -> bool:
    """Whether layer `index` of a mixture of experts is one, not a dense layer: as it is listed, or by a rule."""
    types = per_layer(keys, "mlp_layer_types")
    if types:
        if types[index] not in ("dense", "sparse", "moe", "hash_moe"):
            raise keys.error("mlp_layer_types", f"has {shown(types[index])}; known: dense, sparse")
        return types[index] != "dense"
    if keys.has_list("moe_layer_freq"):
        return number_at(keys, "moe_layer_freq", index, least=0) > 0
    return family.sparse is None or family.sparse(keys, index)
