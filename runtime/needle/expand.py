"""Unpack the shipped int8 weights into a folder that Hugging Face loads."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PACKED = Path(__file__).parent
WEIGHTS = "weights-int8.safetensors"
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def expand(dest: Path) -> Path:
    """Write needle-28m as a Hugging Face folder and return it; an expanded folder is left as it is.

    Every matrix becomes int8 * scale (one fp32 scale a row), rounded to bf16; norms are bf16 already. The weights are
    written last and renamed into place, so a folder that has them is whole. `ValueError` if `dest` is a file, or has
    another model in it.
    """
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"dest={dest} is a file; name a folder, which need not exist")
    weights = dest / "model.safetensors"
    if weights.exists():
        config = dest / "config.json"
        if not config.is_file() or config.read_bytes() != (PACKED / "config.json").read_bytes():
            raise ValueError(f"dest={dest} has another model in it; name a folder that has none")
        return dest
    dest.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(PACKED / name, dest / name)
    unfinished = dest / "model.safetensors.part"
    save_file(_unpacked(PACKED / WEIGHTS), unfinished, metadata={"format": "pt"})
    unfinished.replace(weights)
    return dest


def _unpacked(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as packed:
        tensors = {name: packed.get_tensor(name) for name in packed.keys()}  # noqa: SIM118 (not a mapping)
    scales = {name.removesuffix(".scale"): tensors.pop(name) for name in list(tensors) if name.endswith(".scale")}
    return {
        name: (tensor.float() * scales[name][:, None]).bfloat16() if name in scales else tensor
        for name, tensor in tensors.items()
    }
