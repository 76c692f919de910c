"""Loads a model from a folder of this machine: no download, no code from the folder, no pickle."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from policies.hf.local_cache import cached_folder, is_hub_name
from policies.shown import shown
from runtime.arena import DTYPES
from runtime.needle import expand
from runtime.needle.kept import kept

NEEDLE = "needle-28m"


@contextmanager
def model_folder(where: str) -> Iterator[Path]:
    """The folder `where`, one of Hugging Face's local cache by ORG/NAME, or that of needle-28m.

    That one is kept in the user's cache, or unpacked for as long as the context lasts where there is none. Raises
    ValueError when there is no model.
    """
    if where == NEEDLE:
        with ExitStack() as stack:
            try:
                unpacked = kept()
            except OSError:  # no cache that can be written
                unpacked = expand(Path(stack.enter_context(TemporaryDirectory(prefix=NEEDLE))))
            yield unpacked
        return
    folder = Path(where)
    if is_hub_name(where) and not folder.exists():
        folder = cached_folder(where, weights=True)
    if not (folder / "config.json").is_file() and _gguf(folder) is None:
        raise ValueError(f"{where}: no folder with a config.json or one GGUF file; name a model's folder, or {NEEDLE}")
    yield folder


def load_model(folder: Path, device: str | None = None, dtype: str | None = None) -> Any:
    """The causal language model of a folder, ready to generate.

    `device` None: the first GPU, or the CPU where there is none. `dtype` None: as stored on a GPU, fp32 on a CPU.
    Raises ValueError for a folder, device or dtype that will not do, MemoryError when the weights do not fit.
    """
    where = _device(device)
    floating = [name for name, known in DTYPES.items() if known.is_floating_point]
    if dtype is not None and dtype not in floating:
        raise ValueError(f"dtype {shown(dtype)} is unknown; the runtime computes in {', '.join(floating)}")
    kind = DTYPES[dtype] if dtype is not None else torch.float32 if where.type == "cpu" else "auto"
    visible = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=kind,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **_packed(Path(folder)),
        )
        return model.to(where).eval()
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{folder}: the weights do not fit into the memory of {where}") from error
    except OSError as error:
        raise ValueError(f"{folder}: no model to load ({' '.join(str(error).split())})") from error
    finally:
        if visible:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; ValueError when there is none, or none that can be read."""
    packed = _packed(Path(folder))
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **packed)
    except Exception as error:  # tokenizers raises no narrower one for a file that it cannot parse
        raise ValueError(
            f"{folder}: no tokenizer to load ({' '.join(str(error).split())}); put the model's tokenizer.json there"
        ) from error


def _packed(folder: Path) -> dict[str, str]:
    """How Transformers is told that a folder is one GGUF file, which it turns back into the weights' own type.

    Raises ValueError where it lacks what reads one.
    """
    if (folder / "config.json").is_file() or (file := _gguf(folder)) is None:
        return {}
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise ValueError(f"{file} needs {' and '.join(missing)} to be read: pip install 'kvsim[real]'")
    return {"gguf_file": file.name}


def _gguf(folder: Path) -> Path | None:
    """The only GGUF file of a folder."""
    files = list(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {shown(name)} must be cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {shown(name)} must be cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {shown(name)} is not there: PyTorch sees {torch.cuda.device_count()} GPUs; use cpu")
    return device
