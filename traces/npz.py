"""Reads NumPy archives (`.npz`) whose sizes and types are checked before anything is unpacked."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from traces.files import EXPANSION, check_regular

UNPACKED_BYTES = 256 << 20
"""What any archive may unpack to; beyond, `traces.files.EXPANSION` bounds it."""
KINDS = "biufUS"  # flags, numbers and text; objects would need pickle
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, struct.error),
    *(
        KeyError,
        TypeError,
        SyntaxError,
        tokenize.TokenError,
        MemoryError,
        OverflowError,
    ),  # of a header, which is read as a Python literal
    RuntimeError,  # encrypted, packed in an unknown way, or nested too deep
)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an archive by name; ValueError, saying what is wrong, for anything but one of plain arrays.

    OSError when the file cannot be opened.
    """
    check_regular(path)
    most_bytes = max(UNPACKED_BYTES, EXPANSION * path.stat().st_size)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > most_bytes:
                raise ValueError(f"unpacks to more than {most_bytes:,} bytes")
            names = [entry.filename.removesuffix(".npy") for entry in entries]
            if len(set(names)) < len(names) or any(not entry.filename.endswith(".npy") for entry in entries):
                raise ValueError("an entry that is no array, or one twice")
            found = {}
            for name, entry in zip(names, entries, strict=True):
                with archive.open(entry) as stream:
                    found[name] = _read_array(stream, name)
            return found
    except _DAMAGE as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _read_array(stream: IO[bytes], name: str) -> NDArray[Any]:
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array {name!r} has the unknown format {version}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.kind not in KINDS or dtype.hasobject:
        raise ValueError(f"array {name!r} is of dtype {dtype}, neither numbers nor text")
    count = math.prod(shape)
    data = bytearray(stream.read())
    if min(shape, default=0) < 0 or dtype.itemsize * count != len(data):
        raise ValueError(f"array {name!r} of shape {shape} and dtype {dtype} needs other than its {len(data):,} bytes")
    array = np.frombuffer(data, dtype, count) if dtype.itemsize else np.zeros(count, dtype)
    return array.reshape(shape, order="F" if fortran else "C")
