"""The README's first table says what was measured, and was measured with the command that `make demo` runs."""

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_table_is_of_the_committed_result_of_the_makefile_s_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import demo

    result = json.loads(demo.RESULT.read_text())
    assert result["measured"]["command"] == shlex.join(["kvsim", *demo.command()])
    (found,) = re.finditer(demo.TABLE, demo.README.read_text(encoding="utf-8"))
    assert found[0] == demo.table(result)
    (warning,) = next(run["warnings"] for run in result["runs"] if run["inputs"]["policy"] == "offload-all")
    advice = re.search(r"--max-num-seqs \d+ would give at least 90% of the tokens/s", warning)
    assert advice
    assert f"`{advice[0].removesuffix(' would give at least 90% of the tokens/s')}`" in demo.README.read_text("utf-8")
    policies = [run["inputs"]["policy"] for run in result["runs"]]
    asked = demo.command()
    assert policies == [asked[i + 1] for i, word in enumerate(asked) if word == "--policy"]
