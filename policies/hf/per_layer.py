"""Keys that hold one value for all layers or a list with one for each."""

from collections.abc import Mapping

from policies.hf.keys import Keys


def number_at(keys: Keys, key: str, index: int, default: int | None = None, least: int = 1) -> int:
    """The whole number of layer `index`; ValueError for a list that is too short, or holds anything else."""
    overrides = keys.value("per_layer_config")
    if isinstance(overrides, Mapping):  # Transformers' own way: by layer number, as text or as number, 07 or 7
        of_layer = next((overrides[name] for name in (f"{index:02d}", str(index), index) if name in overrides), None)
        if isinstance(of_layer, Mapping) and of_layer.get(key) is not None:
            return Keys({key: of_layer[key]}, f"layer {index}", {}).number(key, None, least)
    if not keys.has_list(key):
        return keys.number(key, default, least)
    values = keys.sequence(key)
    if index >= len(values):
        raise keys.error(key, f"has {len(values)} entries; layer {index} needs one")
    value = values[index]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise keys.error(key, f"must list whole numbers of at least {least}")
    return value


def per_layer(keys: Keys, key: str) -> list[object]:
    """One entry for each layer, empty when the key is missing; further ones are of multi-token prediction."""
    values, layers = keys.sequence(key), keys.number("num_hidden_layers")
    if values and len(values) not in (layers, layers + keys.number("num_nextn_predict_layers", 0, least=0)):
        raise keys.error("num_hidden_layers", f"differs from the {len(values)} entries of {key}")
    return values[:layers]
