"""Streams the files of a tar archive, and turns what damaged archives raise into one clear error."""

import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from traces.files import open_packed
from traces.schema import TraceError

MEMBER_BYTES = 256 << 20
"""The largest file of an archive that is taken for real; published ones have less than a tenth."""


@contextmanager
def whole_file(path: Path) -> Iterator[None]:
    """Raises TraceError for whatever a truncated, damaged or wrongly named file raises while it is read."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, tarfile.TarError, OverflowError) as error:
        raise TraceError(f"{path}: truncated or damaged archive ({error}); fetch the file again") from error
    except UnicodeDecodeError as error:
        where = f"byte {error.start}: {error.reason}"
        raise TraceError(f"{path}: not UTF-8 text ({where}); convert it, or name it .gz if it is gzipped") from error


def members(path: Path) -> Iterator[tuple[str, str]]:
    """(member name, text) of each file in a tar archive, in its order, one at a time; nothing is written to disk.

    Raises TraceError for links, devices and sparse files, whose content is not theirs, and for files too large.
    """
    # As a stream: seeking by the sizes that a damaged header states could go round in circles.
    with whole_file(path), open_packed(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise TraceError(f"{path}/{member.name}: a link, device or sparse file; pack plain files alone")
            if member.size > MEMBER_BYTES:
                raise TraceError(f"{path}/{member.name}: {member.size:,} bytes; must be at most {MEMBER_BYTES:,}")
            content = archive.extractfile(member)
            if content is not None:
                yield member.name, content.read().decode()
