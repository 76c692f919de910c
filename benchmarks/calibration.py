"""Put a calibration into the catalogue: the GPU's `measured` set, its record and docs/measured/calibration.md.

`python benchmarks/calibration.py benchmarks/results/calibration_h200-sxm.json h200-sxm` takes the record that
`kvsim hardware calibrate` wrote beside its file (FILE.json), fits its samples anew, and rewrites all three.
"""

import argparse
import json
import re
from pathlib import Path

from kvsim.hardware.calibration.calibrate import Calibration, calibration
from kvsim.hardware.calibration.document import as_yaml
from kvsim.hardware.calibration.samples import Sample

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "measured" / "calibration.md"
INTRODUCTION = """\
# Calibrated kernels

Written by `python benchmarks/calibration.py RECORD GPU` from the measurements of `kvsim hardware calibrate`; constants
are `load_gpu("{gpu}@measured").kernels`, and every time stands in `benchmarks/results/calibration_{gpu}.json`.
{origin}.

Two thirds of the *shapes* were seen by the fit and one third was not; all sizes of a shape are on one side.
MAPE is the mean of |price / measured - 1|, bias the mean of price / measured - 1.

"""
NOTES = """\

What the figures hide:

- Matrices and caches are read from HBM, one after the other, in CUDA graphs; values are random. Times are of short
  bursts: the second pass, on a GPU that had run for a minute, took up to 14 % longer for the largest bf16 GEMMs, and
  fits of each pass alone differ by 3.6 % (bf16 GEMMs), 1.4 (fp8), 2.6 (prompts) and 0.6 (decode steps) in the mean. The
  constants are of both; `calibrate` warms the GPU before the first time is taken now, which these passes did not.
- Attention is torch's: FlashAttention 2 for decode steps, the quicker of it and cuDNN for prompts. Its decode kernel
  splits no sequence once KV heads outnumber the SMs by far, and reads 2.7 TB/s then, where 4.4 are reached with fewer;
  engines with other kernels do better, and the `serving` set is theirs.
- Elementwise kernels, device copies and single and batched copies have one shape each, so none is left unseen. Batched
  copies of small pieces follow no straight line: 4 KiB cost 1.4 us each, 16 KiB 2.4 to 3.
- Few small rows that one graph reads again and again are served by caches, so gathers of rows below 2 KiB are those of
  65,536 rows a call; `calibrate` draws other rows for every replay now.
- All-reduce, experts, k-means, block-wise fp8 and attention over fp8 were not measured: the `serving` constants stand.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path, help="the JSON that calibrate wrote")
    parser.add_argument("gpu", help="the catalogue's name")
    asked = parser.parse_args()
    record = json.loads(asked.record.read_text(encoding="utf-8"))
    result = calibration(asked.gpu, [[sample(one) for one in record["samples"]]], record["origin"])
    (ROOT / "benchmarks" / "results" / f"calibration_{asked.gpu}.json").write_text(result.record, encoding="utf-8")
    rewrite(ROOT / "kvsim" / "catalogue" / "gpus" / f"{asked.gpu}.yaml", result)
    PAGE.write_text(document(asked.gpu, result), encoding="utf-8")


def sample(row: dict[str, str | float]) -> Sample:
    """A row of the record."""
    own = ("kernel", "dtype", "us", "spread", "drift")
    return Sample(
        kernel=str(row["kernel"]),
        dtype=str(row["dtype"]),
        arguments=tuple((name, int(value)) for name, value in row.items() if name not in own),
        seconds=float(row["us"]) / 1e6,
        spread=float(row["spread"]),
        drift=float(row["drift"]),
    )


def rewrite(path: Path, result: Calibration) -> None:
    """Replace the `measured` set of a catalogue file and the sources of it; all else stays as it is."""
    text = path.read_text(encoding="utf-8")
    block = as_yaml({"measured": result.document["measured"]})
    text = re.sub(r"^measured:\n(?:[ ].*\n)*", lambda _: block, text, flags=re.MULTILINE)
    text = re.sub(r"^  measured\.\w+: .*\n(?:    .*\n)*", "", text, flags=re.MULTILINE)
    new = {key: source for key, source in result.document["sources"].items() if key.startswith("measured.")}
    lines = as_yaml({"sources": new}).partition("\n")[2]
    path.write_text(text.rstrip("\n") + "\n" + lines, encoding="utf-8")


def document(gpu: str, result: Calibration) -> str:
    """The page as Markdown."""
    text = INTRODUCTION.format(gpu=gpu, origin=result.origin)
    text += "| kernel | type | shapes | times | MAPE | bias |\n|---|---|---|--:|--:|--:|\n"
    for one in result.residuals:
        seen = "seen" if one.seen else "unseen"
        row = f"| {one.kernel} | {one.dtype} | {seen} | {one.shapes} | {one.mape:.1%} | {one.bias:+.1%} |\n"
        text += row.replace("%", " %")
    text += "\n## Repeats\n\nOf each kernel's median shape: the interquartile range of nine repeats, and how far two "
    text += "passes a minute apart\ndiffer.\n\n| kernel | spread | between passes |\n|---|--:|--:|\n"
    for name, spread, drift in result.steadiness:
        text += f"| {name} | {spread:.1%} | {drift:.1%} |\n".replace("%", " %")
    return text + NOTES


if __name__ == "__main__":
    main()
