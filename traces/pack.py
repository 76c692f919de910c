"""Makes the bundled data from the original files, so that anyone can check it: `python -m traces.pack SOURCE DEST`.

SOURCE has one folder for each data set, with its LICENSE and the files as their repositories publish them (paths and
commits: `traces/data/README.md`); coding sessions and ServeGen clients are tar archives of those files. Text is gzipped
(unchanged inside), the ServeGen archive is copied, the coding sessions are packed by `traces.agentic`. The output
depends on the input alone.
"""

import gzip
import shutil
import sys
from pathlib import Path

from traces import agentic

GZIPPED = {
    "mooncake": ("conversation_trace.jsonl", "synthetic_trace.jsonl"),
    "azure-2023": ("AzureLLMInferenceTrace_code.csv", "AzureLLMInferenceTrace_conv.csv"),
}
SERVEGEN = "deepseek-r1.tar.xz"


def pack(source: Path, dest: Path) -> None:
    """Write all bundled data files and their licences below `dest`."""
    for folder in (*GZIPPED, "agentic-coding", "servegen"):
        (dest / folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / folder / "LICENSE", dest / folder / "LICENSE")
    for folder, texts in GZIPPED.items():
        for name in texts:
            packed = gzip.compress((source / folder / name).read_bytes(), compresslevel=9, mtime=0)
            (dest / folder / f"{name}.gz").write_bytes(packed)
    shutil.copyfile(source / "servegen" / SERVEGEN, dest / "servegen" / SERVEGEN)
    agentic.read_archive(source / "agentic-coding" / "traces.tar.xz").save(dest / "agentic-coding" / "sessions.npz")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m traces.pack SOURCE DEST")
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
