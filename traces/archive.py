"""Streams the files of a tar archive, and turns what damaged archives raise into one clear error."""

import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from traces.schema import TraceError


@contextmanager
def whole_file(path: Path) -> Iterator[None]:
    """Raises TraceError for whatever a truncated, damaged or wrongly named file raises while it is read."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise TraceError(f"{path}: truncated or damaged archive ({error}); fetch the file again") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not UTF-8 text ({error}); convert it, or name it .gz if it is gzipped") from error


def members(path: Path) -> Iterator[tuple[str, str]]:
    """(member name, text) of each file in a tar archive, in its order, one at a time."""
    with whole_file(path), tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                yield member.name, content.read().decode()
