"""Model shapes by name, from the catalogue of public configs, or from any Hugging Face `config.json`."""

import json
from importlib.resources import files
from pathlib import Path

from kvsim.documents import parse_json, read_document
from kvsim.names import unknown_name
from policies import hf
from policies.model import ModelShape
from policies.shown import shown

_CATALOGUE = files("kvsim") / "catalogue" / "models"


def model_names() -> list[str]:
    """Names of the catalogue's models, sorted."""
    return sorted(entry.name.removesuffix(".json") for entry in _CATALOGUE.iterdir() if entry.name.endswith(".json"))


def load_model(text: str) -> ModelShape:
    """The model of that catalogue name, or the one that a `config.json`, or a folder holding one, describes.

    Raises ValueError for a name that is not known (the known ones are listed, nearest first), for malformed JSON, and
    for a config that is not understood; FileNotFoundError for a path that leads nowhere.
    """
    if text in model_names():
        return _read((_CATALOGUE / f"{text}.json").read_text(encoding="utf-8"), text, f"catalogue model {shown(text)}")
    path = Path(text).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif path.suffix != ".json" and len(path.parts) == 1 and not path.exists():
        raise unknown_name("model", text, model_names())
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return _read(read_document(path), name, str(path))


def model_source(name: str) -> str:
    """Where a catalogue model's figures are from, and what its design needs to be trained for; none for any other."""
    if name not in model_names():
        return ""
    source = json.loads((_CATALOGUE / f"{name}.json").read_text(encoding="utf-8"))["_source"]
    return str(source)


def _read(document: str, name: str, origin: str) -> ModelShape:
    config = parse_json(document, origin)
    match config:
        case dict():
            return hf.read(config, name)
        case _:
            raise ValueError(f"{origin} holds a JSON {type(config).__name__}; a config.json holds an object")
