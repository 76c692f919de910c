"""Mutated files of saved caches: damaged bytes, and forged headers and tensors whose checksums are right again."""

import copy
import json
import random
import struct
from contextlib import ExitStack
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open

from policies import parse_policy
from runtime import Offload, offload
from runtime.digest import digest
from runtime.saved_header import DIGEST, FORMAT

POLICIES = (
    "full",
    "quest:page_tokens=4,budget_tokens=16,dense_layers=0",
    "shadowkv:budget_tokens=16,chunk_tokens=4,rank=4,outlier_chunks=1",
    "windows",
)
DTYPES = (
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E5M2",
    "I16",
    "F16",
    "BF16",
    "I32",
    "F32",
    "I64",
    "F64",
    "C64",
    "F4",
    "X",
    "",
)
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 57, 58, 65, 66, 255, 2**31, 2**40, 2**40 + 1, 2**63, 10**9, 10**30, 10**400, -(10**30)),
    *(0.0, 1.0, 1.5, 1e300, float("nan"), float("inf")),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, "", "1", "full", "../../etc/passwd", "\x1b[31m", "\ud800", "x" * 100_000, "\x00"),
    *([], {}, [1], {"0": 1}, {"../x": 2}, {"-1": 1}, {"01": 1}, {"1e3": 1}, {"٣": 1}, {"9" * 5000: 1}),
)


class Ground(NamedTuple):
    """A file that is right, in its parts, and the context that it is loaded in."""

    kv: Offload
    entries: dict[str, Any]  # of the tensors: dtype, shape, data_offsets
    says: dict[str, Any]
    data: bytes
    tensors: dict[str, torch.Tensor]


@cache
def ground(policy: str) -> Ground:
    """A cache of 57 tokens and two sequences under a policy; `windows`: on a model with sliding layers."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "eos_token_id": None,
    }
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    config = transformers.Gemma2Config(**sizes, **windows) if policy == "windows" else transformers.LlamaConfig(**sizes)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    kv = KEPT.enter_context(offload(model, parse_policy("full" if policy == "windows" else policy), max_new_tokens=8))
    with TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "cache"
        ids = torch.arange(114).view(2, 57) % 60
        model(ids, past_key_values=(built := kv.cache()), attention_mask=(ids != 0).long())
        kv.save(built, path)
        content = path.read_bytes()
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    says = json.loads(entries.pop("__metadata__")[FORMAT])
    return Ground(kv, entries, says, content[8 + length :], tensors)


KEPT = ExitStack()  # the contexts stay open for as long as the process lives


def assembled(entries: Any, metadata: Any, data: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file; `length`: what it says of its header's."""
    header = entries | {"__metadata__": metadata} if metadata is not None else entries
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def signed(says: Any) -> dict[str, str]:
    """Metadata whose checksum is right, of any JSON value, or of a text as it is."""
    text = says if isinstance(says, str) else json.dumps(says)
    return {FORMAT: text, DIGEST: sha256(text.encode(errors="surrogatepass")).hexdigest()}


def whole(ground: Ground, says: Any) -> bytes:
    """The file with another header text, signed."""
    return assembled(ground.entries, signed(says), ground.data)


def refused(kv: Offload, path: Path) -> bool:
    """Whether the file is refused; AssertionError where it is, but not by a short ValueError that names it."""
    try:
        kv.load(path)
        return False
    except ValueError as error:
        kind, said = type(error), str(error)
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}"[:500]) from error
    assert kind is ValueError, f"{kind.__name__}: {said}"
    assert said.startswith(str(path)), said[:300]
    assert len(said) < len(str(path)) + 700, f"{len(said)} characters: {said[:300]}"
    assert said.isprintable(), ascii(said)
    return True


def attempt(rng: random.Random, folder: Path) -> str:
    """Make one mutated file, and try to load it: "refused", or "read" where nothing that counts was changed.

    Raises AssertionError where anything but a ValueError comes, or damaged bytes pass for the cache.
    """
    base = ground(rng.choice(POLICIES))
    path = folder / "forged"
    mutate = rng.choice((_bytes, _bytes, _says, _says, _says, _entries, _tensor, _metadata))
    path.write_bytes(mutate(rng, base))
    if refused(base.kv, path):
        return "refused"
    if mutate in (_bytes, _entries):  # their checksums are those of the original
        with safe_open(path, framework="pt") as file:
            for name, tensor in base.tensors.items():
                assert torch.equal(file.get_tensor(name), tensor), f"{name} was damaged, and read"
    return "read"


def _bytes(rng: random.Random, base: Ground) -> bytes:
    content = bytearray(whole(base, base.says))
    kind, at = rng.randrange(6), rng.randrange(len(content))
    if kind == 0:
        return bytes(content[:at])
    if kind == 1:
        return bytes(content + rng.randbytes(rng.randrange(1, 100)))
    if kind == 2:
        content[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 3:
        del content[at : at + rng.randrange(1, 9)]
    elif kind == 4:
        content[:8] = struct.pack("<Q", rng.choice((0, 1, at, len(content) - 8, 2**31, 2**63, 2**64 - 1)))
    else:
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _says(rng: random.Random, base: Ground) -> bytes:
    says = copy.deepcopy(base.says)
    for _ in range(rng.choice((1, 1, 1, 2))):
        holder = says
        while True:
            inner = [value for value in holder.values() if isinstance(value, dict) and value]
            if not inner or rng.random() < 0.6:
                break
            holder = rng.choice(inner)
        key = rng.choice(list(holder)) if holder else "x"
        kind = rng.randrange(5)
        if kind == 0:
            holder.pop(key, None)
        elif kind == 1:
            holder[rng.choice(("extra", "", "../x", "999", "0 ", key + "\x00"))] = holder.get(key)
        elif kind == 2 and type(holder.get(key)) is int:
            holder[key] += rng.choice((-1, 1, 2, -57, 2**33))
        else:
            holder[key] = rng.choice(NUMBERS) if rng.random() < 0.6 else rng.choice(OTHERS)
    text = json.dumps(says)
    if rng.random() < 0.1:
        text = rng.choice(
            (text + text, text[:-1], f"[{text}]", text[:-1] + ', "batch": 2}', "[" * 50_000, f"\ufeff{text}")
        )
    return whole(base, text)


def _entries(rng: random.Random, base: Ground) -> bytes:
    entries = copy.deepcopy(base.entries)
    name, other = (rng.choice(list(entries)) for _ in range(2))
    entry, kind = entries[name], rng.randrange(7)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = rng.choice(
            ([], [0], entry["shape"][::-1], [1, *entry["shape"]], [2**62, 4], [-1], [10**9] * 3)
        )
    elif kind == 2:
        entry["data_offsets"] = rng.choice(([0, 0], entries[other]["data_offsets"], [0, 2**63], [8, 4], [-8, 0]))
    elif kind == 3:
        entries[rng.choice(("../x", "0.", "", "x\x00y", "\x1b[2J", other))] = entries.pop(name)
    elif kind == 4:
        del entries[name]
    elif kind == 5:
        entries[name], entries[other] = entries[other], entries[name]
    else:
        entries[name] = rng.choice(OTHERS)
    return assembled(entries, signed(base.says), base.data)


def _tensor(rng: random.Random, base: Ground) -> bytes:
    """Other numbers in one tensor, with a digest that is right."""
    name = rng.choice(list(base.tensors))
    tensor = base.tensors[name].clone()
    flat, at = tensor.view(-1), rng.randrange(tensor.numel())
    if tensor.is_floating_point():
        flat[at] = rng.choice((0.0, float("nan"), float("inf"), -float("inf"), 1e30))
    elif tensor.dtype == torch.bool:
        flat[at] = ~flat[at]
    else:
        flat[at] = rng.choice((0, -1, 1, 2**31 - 1))
    first, last = base.entries[name]["data_offsets"]
    data = base.data[:first] + tensor.view(-1).view(torch.uint8).numpy().tobytes() + base.data[last:]
    says = base.says | {"digests": base.says["digests"] | {name: digest(tensor)}}
    return assembled(base.entries, signed(says), data)


def _metadata(rng: random.Random, base: Ground) -> bytes:
    right = signed(base.says)
    return assembled(
        base.entries,
        rng.choice(
            (
                {},
                {FORMAT: right[FORMAT]},
                right | {"more": "x"},
                right | {DIGEST: "0" * 64},
                {"kvsim-cache-1": right[FORMAT]},
                {FORMAT: 1, DIGEST: None},
                signed("not JSON"),
                signed([]),
                signed(None),
                "text",
                [],
            )
        ),
        base.data,
    )
