"""What may be read where a user names a file: regular files and what is open already, never more than a bound."""

from __future__ import annotations

import gzip
import io
import lzma
import stat
from pathlib import Path
from typing import IO, cast

from traces.schema import TraceError

OPEN_ALREADY = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # what a shell has opened: `-`, `<(command)`
UNPACKED_BYTES = 16 << 20
"""What any packed file may unpack to; beyond, EXPANSION bounds it."""
EXPANSION = 200
"""Unpacked bytes for each packed one, beyond UNPACKED_BYTES: text of requests shrinks to a fifth or a fiftieth, a
file that was made to fill memory (zeros, or one row over and over) to a thousandth."""


def check_regular(path: Path) -> None:
    """Raise TraceError for a folder, a device or a pipe, whose reading may never end; OSError when there is none.

    Standard input and what else a shell has opened may be a pipe.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or str(path).startswith(OPEN_ALREADY):
        return
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
    raise TraceError(f"{path} is {kind}, not a file; name a regular file, or /dev/stdin to read what is piped in")


def open_packed(path: Path) -> IO[bytes]:
    """The bytes of a gzip or xz file, or of one that is not packed, unpacked as they are read and never too many.

    Reading raises TraceError where they outgrow UNPACKED_BYTES and EXPANSION, and what `gzip` and `lzma` raise.
    """
    check_regular(path)
    packed_bytes = path.stat().st_size
    stream: IO[bytes]
    if path.suffix in (".gz", ".tgz"):
        stream = cast("IO[bytes]", gzip.GzipFile(path))
    elif path.suffix in (".xz", ".txz"):
        stream = cast("IO[bytes]", lzma.LZMAFile(path))  # noqa: SIM115 - whoever reads it closes it
    else:
        return path.open("rb")
    most_bytes = max(UNPACKED_BYTES, EXPANSION * packed_bytes)
    return cast("IO[bytes]", io.BufferedReader(_Bounded(stream, most_bytes, path)))


class _Bounded(io.RawIOBase):
    """A stream that ends in an error where more comes out of it than `most_bytes`."""

    def __init__(self, stream: IO[bytes], most_bytes: int, path: Path) -> None:
        self._stream, self._left_bytes = stream, most_bytes
        self._rule = (
            f"{path}: unpacks to more than {most_bytes:,} bytes, over {EXPANSION} times its size, as a file does that "
            "is made to fill memory; if it is one of requests, unpack it and name the unpacked file"
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        chunk = self._stream.read(len(buffer))
        self._left_bytes -= len(chunk)
        if self._left_bytes < 0:
            raise TraceError(self._rule)
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self._stream.close()
        super().close()
