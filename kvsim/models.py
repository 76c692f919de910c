"""Model shapes by name, from the catalogue of public configs, or from any Hugging Face `config.json`."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvsim.text.documents import parse_json, read_document
from kvsim.text.names import unknown_name
from policies import hf
from policies.hf.local_cache import cached_folder, is_hub_name
from policies.model import ModelShape
from policies.shown import shown

_CATALOGUE = files("kvsim") / "catalogue" / "models"
_QUANTISED_BESIDE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of ModelOpt, AutoGPTQ and AutoAWQ that say what a config.json itself may not, by the method they are of."""


def model_names() -> list[str]:
    """Names of the catalogue's models, sorted."""
    return sorted(entry.name.removesuffix(".json") for entry in _CATALOGUE.iterdir() if entry.name.endswith(".json"))


def load_model(text: str, params: int | None = None) -> ModelShape:
    """The model of that catalogue name, or the one that a `config.json`, or a folder holding one, describes.

    ORG/NAME, where no such folder is, is looked up in Hugging Face's local cache. `params` are the weights of an
    architecture that is not in the table of families. Raises ValueError for a name that is
    not known (the known ones are listed, nearest first), for malformed JSON, and for a config that is not understood;
    FileNotFoundError for a path that leads nowhere.
    """
    return hf.read(*load_config(text), params=params)


def load_config(text: str) -> tuple[dict[str, Any], str]:
    """The keys of a model's config, and its name; see `load_model`."""
    if text in model_names():
        return _object((_CATALOGUE / f"{text}.json").read_text(encoding="utf-8"), text), text
    path = Path(text).expanduser()
    if path.suffix != ".json" and is_hub_name(text) and not path.exists():
        return _read_file(cached_folder(text) / "config.json"), text
    if path.is_dir():
        path = path / "config.json"
    elif path.suffix != ".json" and len(path.parts) == 1 and not path.exists():
        raise unknown_name("model", text, model_names())
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return _read_file(path), name


def model_source(name: str) -> str:
    """Where a catalogue model's figures are from, and what its design needs to be trained for; none for any other."""
    if name not in model_names():
        return ""
    source = json.loads((_CATALOGUE / f"{name}.json").read_text(encoding="utf-8"))["_source"]
    return str(source)


def _read_file(path: Path) -> dict[str, Any]:
    """The keys of a config.json, and of what a toolkit wrote beside it about quantised weights."""
    config = _object(read_document(path), str(path))
    given = config.get("quantization_config")
    own = isinstance(given, dict) and given.get("quant_method") not in (None, "modelopt")
    for file, method in _QUANTISED_BESIDE.items():
        beside = path.parent / file
        if path.name == "config.json" and not own and beside.is_file():
            written = _object(read_document(beside), str(beside))
            inner = written.get("quantization", written)
            if not isinstance(inner, dict):
                raise ValueError(f"{beside}: quantization must be an object, not {shown(inner)}")
            config["quantization_config"] = {"quant_method": method, **inner}
            break
    return config


def _object(document: str, origin: str) -> dict[str, Any]:
    config = parse_json(document, origin)
    if not isinstance(config, dict):
        raise ValueError(f"{origin} holds a JSON {type(config).__name__}; a config.json holds an object")
    return config
