"""What the README says of quality is what the committed measurements say."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = {  # the rows of the README's table of policies that have a figure, by the rows measured
    "sink-window": "sink-window 1/8",
    "snapkv": "snapkv 1/8",
    "quest": "quest 1/8",
    "infllm": "infllm 1/8",
    "squeezed-attention": "squeezed-attention keep=0.1",
    "shadowkv": "shadowkv 1/8",
    "retrieval-attention": "retrieval-attention graph",
}


def test_the_readme_says_what_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "real_text.json").read_text())["rows"]
    kl = {}
    for row in (row for row in rows if row["context_tokens"] == 6144):
        values = [value for of in row["kl_nats"].values() for value in of]
        kl[row["way"]] = f"{sum(values) / len(values):.3f}"
    said = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6 and cells[1].strip("`") in SHOWN:
            said[cells[1].strip("`")] = cells[3]
    assert said == {name: kl[way] for name, way in SHOWN.items()}
