"""Where Hugging Face's own tools keep what was downloaded: looked into, never added to."""

import os
import re
from pathlib import Path

from policies.shown import shown

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w.-]{1,128}", re.ASCII)


def is_hub_name(text: str) -> bool:
    """Whether a text could be the name of a model on the hub, ORG/NAME."""
    return len(text) <= 200 and _NAME.fullmatch(text) is not None and ".." not in text


def hub_cache() -> Path:
    """The folder of the cache, by HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME, as huggingface_hub finds it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(home).expanduser() / "hub"


def cached_folder(name: str, *, weights: bool = False) -> Path:
    """The folder of a model's cached snapshot: that of its branch main, or the only one.

    Raises ValueError, which says how to get it, with or without its weights, when there is none with a config.json.
    """
    folder = hub_cache() / f"models--{name.replace('/', '--')}"
    try:
        chosen = [(folder / "refs" / "main").read_text(encoding="utf-8").strip()]
    except (OSError, UnicodeDecodeError):
        snapshots = folder / "snapshots"
        chosen = sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []
    if len(chosen) == 1 and _REVISION.fullmatch(chosen[0]):
        snapshot = folder / "snapshots" / chosen[0]
        if (snapshot / "config.json").is_file():
            return snapshot
    got = f"hf download {name}" if weights else f"hf download {name} --include '*.json'"
    raise ValueError(
        f"no config.json of {shown(name)} is in the Hugging Face cache {hub_cache()}, and nothing is downloaded "
        f"unasked; get it with: {got}, or name the path of {'a folder that holds one' if weights else 'a config.json'}"
    )
