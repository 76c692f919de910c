"""Whether a file that a command writes at its end could be written there."""

import os
import tempfile
from pathlib import Path


def check_takes_a_file(option: str, path: Path) -> None:
    """Raise ValueError before a long run where the file of an option could not be written after it."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file in it")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written; choose another name")
    if path.exists() and not path.is_file():
        return  # a device or a pipe
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):  # noqa: PTH120
            pass
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}; name a file in a folder that takes one") from None
