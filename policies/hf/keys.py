"""Reading the keys of a Hugging Face `config.json`, with errors that name the key."""

from collections.abc import Mapping
from typing import Any

from policies.shown import shown

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

MOST_LAYERS = 1024
MOST_TOKENS = 2**32
MOST_VOCABULARY = 2**24
MOST = 2**20
"""The largest number that a key may have: of layers, of positions and windows, of a vocabulary, of anything else."""

_LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_TOKEN_KEYS = (
    "max_position_embeddings", "seq_length", "max_seq_len", "max_sequence_length", "n_positions", "n_ctx",
    "sliding_window", "attention_chunk_size", "model_max_length", "max_window_layers",
)  # fmt: skip
_VOCABULARY_KEYS = ("vocab_size", "padded_vocab_size")
_MOST_OF = (
    dict.fromkeys(_LAYER_KEYS, MOST_LAYERS)
    | dict.fromkeys(_TOKEN_KEYS, MOST_TOKENS)
    | dict.fromkeys(_VOCABULARY_KEYS, MOST_VOCABULARY)
)

_ALIASES = {"num_experts": "num_local_experts"}  # what Transformers 5 writes for a key of the published files


def check_kinds(config: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where a key that decides how others are read is no name, or no object of keys."""
    for key, kind, what in (
        ("model_type", str, "a name"),
        ("text_config", Mapping, "an object"),
        ("quantization_config", Mapping, "an object"),
    ):
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"config of {shown(name)}: {key} must be {what}, not {shown(value)}")
        if isinstance(value, Mapping) and not isinstance(value.get("model_type", ""), str | None):
            raise ValueError(f"config of {shown(name)}: model_type in {key} must be a name")


class Keys:
    """The text model's part of a config; a key set to null counts as missing.

    `defaults` are those of the model's configuration class, for keys that published configs leave out.
    """

    def __init__(self, config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> None:
        self._values = {**defaults, **{key: value for key, value in config.items() if value is not None}}
        self._name = name

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def given(self) -> list[str]:
        """Names of all keys."""
        return list(self._values)

    def has_list(self, key: str) -> bool:
        """Whether the key holds a list, so one value for each layer."""
        return isinstance(self._values.get(key), list | tuple)

    def error(self, key: str, rule: str) -> ValueError:
        """The error to raise for the value of `key`."""
        text = shown(self._values.get(key))
        if "..." in text:  # what is left of a long value comes after the rule that it breaks
            return ValueError(f"config of {shown(self._name)}: {key} {rule}; it begins {text}")
        return ValueError(f"config of {shown(self._name)}: {key}={text} {rule}")

    def value(self, key: str) -> Any:
        """Whatever a key holds; None when it is missing."""
        return self._values.get(key)

    def number(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` to the most of its kind; ValueError when it is missing and has no default."""
        value = self._values.get(key, self._values.get(_ALIASES.get(key, ""), default))
        if value is None:
            raise ValueError(f"config of {shown(self._name)} has no key {shown(key)}; add it")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(key, f"must be a whole number of at least {least}")
        most = _MOST_OF.get(key, MOST)
        if value > most:
            raise self.error(key, f"must be at most {most:,}")
        return value

    def text(self, key: str) -> str:
        """Text that is not empty."""
        value = self._values.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "must be text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def sequence(self, key: str) -> list[Any]:
        """A list, empty when the key is missing."""
        value = self._values.get(key, [])
        if not isinstance(value, list | tuple):
            raise self.error(key, "must be a list")
        return list(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object of keys, empty when the key is missing."""
        value = self._values.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, "must be an object")
        return value

    def names(self, key: str) -> list[str]:
        """A list of names, empty when the key is missing."""
        values = self.sequence(key)
        for value in values:
            if not isinstance(value, str):
                raise self.error(key, f"must be a list of names, and {shown(value)} is none")
        return values

    def dtype(self) -> str:
        """Type of the unquantised weights and the activations; bf16 when the config names none."""
        for key in ("dtype", "torch_dtype"):
            if key in self:
                value = self._values[key]
                name = value.removeprefix("torch.") if isinstance(value, str) else ""
                if name not in DTYPES:
                    raise self.error(key, f"is not one of {', '.join(DTYPES)}")
                return DTYPES[name]
        return "bf16"
