"""Reading the keys of a Hugging Face `config.json`, with errors that name the key."""

from collections.abc import Mapping
from typing import Any

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


_ALIASES = {"num_experts": "num_local_experts"}  # what Transformers 5 writes for a key of the published files


class Keys:
    """The text model's part of a config; a key set to null counts as missing.

    `defaults` are those of the model's configuration class, for keys that published configs leave out.
    """

    def __init__(self, config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> None:
        self._values = {**defaults, **{key: value for key, value in config.items() if value is not None}}
        self._name = name

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def error(self, key: str, rule: str) -> ValueError:
        """The error to raise for the value of `key`."""
        return ValueError(f"config of {self._name!r}: {key}={self._values.get(key)!r} {rule}")

    def number(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; ValueError when it is missing and has no default."""
        value = self._values.get(key, self._values.get(_ALIASES.get(key, ""), default))
        if value is None:
            raise ValueError(f"config of {self._name!r} has no key {key!r}")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(key, f"must be a whole number of at least {least}")
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

    def dtype(self) -> str:
        """Type of the unquantised weights and the activations; bf16 when the config names none."""
        for key in ("dtype", "torch_dtype"):
            if key in self:
                if self._values[key] not in DTYPES:
                    raise self.error(key, f"is not one of {', '.join(DTYPES)}")
                return DTYPES[self._values[key]]
        return "bf16"

    def quantised_dtypes(self) -> tuple[str | None, str | None]:
        """Types of quantised weights: of all of them, and of the routed experts alone."""
        settings = self._values.get("quantization_config")
        if settings is None:
            return None, None
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        if method == "mxfp4":
            return None, "mxfp4"  # gpt-oss converts its experts and nothing else
        if method == "fp8":
            return "fp8", None
        if method in ("awq", "gptq") and settings.get("bits") in (4, 8):
            return f"int{settings['bits']}", None
        raise self.error("quantization_config", "is not understood; known quant_method: fp8, mxfp4, awq, gptq")
