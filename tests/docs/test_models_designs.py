"""What docs/models.md says that designs cache at 128Ki tokens is what their shapes come to."""

import re
from pathlib import Path

from kvsim import load_model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
ROW = re.compile(r"^\| `([\w.-]+)` \| [^|]* \| ([\d.]+) GiB \|", re.MULTILINE)


def test_bytes_of_designs_are_those_of_their_shapes() -> None:
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert len(rows) == 7
    for name, said in rows:
        decimals = len(said.partition(".")[2])
        assert f"{load_model(name).kv_bytes(128 * 1024) / 2**30:.{decimals}f}" == said, name
