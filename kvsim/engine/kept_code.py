"""Files of machine code: each ends in a digest of its content and of what it is for.

What is damaged, unreadable or for something else is as good as not there: it costs a compilation, never a run.
"""

import hashlib
from pathlib import Path


def read(path: Path, purpose: bytes) -> bytes | None:
    """The code that is kept in a file for a purpose; None where there is none, or not all of it."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return code if digest == _digest(code, purpose) else None


def write(path: Path, purpose: bytes, code: bytes) -> None:
    """Keep code in a file, which appears whole; for one writer at a time. OSError where that cannot be."""
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(code + _digest(code, purpose))
        new.replace(path)
    except OSError:
        if new.is_file():
            new.unlink()
        raise


_DIGEST_BYTES = hashlib.sha256().digest_size


def _digest(code: bytes, purpose: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(purpose).digest() + code).digest()
