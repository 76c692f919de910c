"""A program of its own: sets of results written over each other, and killed with SIGKILL at every step of that.

python killed_writer.py FOLDER CASE prints how many moments were tried, and what was wrong after which.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kvsim.results import folder_swap
from kvsim.results.folder import hold

OLD = {"summary.json": "old", "report.html": "old", "full/requests.parquet": "old", "quest/requests.parquet": "old"}
NEW = {"summary.json": "new", "report.html": "new", "full/requests.parquet": "new", "snapkv/requests.parquet": "new"}
MINE = {"notes.txt": "mine", "full/notes.txt": "mine", "quest/notes.txt": "mine"}
MY_FOLDER = {"plots/deep/a.png": "mine"}  # only moves one by one can keep a folder
STEPS = ("open", "os.", "shutil.", "tempfile.", "ctypes.dlsym")  # audit events before what changes files


def earlier(path: Path) -> Sequence[str]:
    """The files of the set that a folder holds: here the summary is its whole name."""
    summary = path / "summary.json"
    return sorted({"old": OLD, "new": NEW}[summary.read_text()]) if summary.exists() else ()


def fill(folder: Path, files: dict[str, str]) -> None:
    """Write files with their content."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def content(folder: Path) -> dict[str, str]:
    """All files below a folder, with their content, but for what is written aside within."""
    names = folder_swap.files_of(folder)
    return {name: (folder / name).read_text() for name in names if not name.startswith(".kvsim-")}


def write_new(out: Path) -> None:
    """Replace what is in the folder by the new set."""
    with hold(out, earlier, list(NEW)) as held:
        held.replace(lambda folder: fill(folder, NEW))


def killed_at(step: int, out: Path) -> bool:
    """Whether the writer had so many steps; it is killed before that one."""
    child = os.fork()
    if not child:
        left = step

        def count(event: str, _arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event.startswith(STEPS) and event != "os.kill":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            write_new(out)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise SystemExit("the writer failed by itself")
    return False


def fault(out: Path, mine: dict[str, str], one_step: bool) -> str | None:
    """What is wrong after a kill, before and after the next run."""
    found = content(out)
    whole = [{**files, **mine} for files in (OLD, NEW)]
    if found not in whole:
        if one_step:
            return f"neither set: {found}"
        if "summary.json" in found:
            return f"a summary beside files of another set: {found}"
        if any(found.get(name) != text for name, text in mine.items()):
            return f"files of the user's are gone: {found}"
    with hold(out, earlier):
        if content(out) not in whole:
            return f"not mended by the next run: {content(out)}"
    left = [path.name for folder in (out, out.parent) for path in folder.glob(".kvsim-*")]
    return f"left over: {left}" if left else None


def main(where: str, case: str) -> None:
    """Try every step once, in a fresh folder each."""
    os.fsync = lambda _descriptor: None  # a kill loses nothing that a process has written
    mine = {**MINE, **(MY_FOLDER if case == "folders" else {})}
    step, seen, faults = 0, set(), []
    while True:
        out = Path(where).resolve() / "out"
        shutil.rmtree(out.parent, ignore_errors=True)
        fill(out, {**OLD, **mine})
        if case == "current":
            os.chdir(out)
        killed = killed_at(step, out)
        seen.add(content(out).get("summary.json"))
        wrong = fault(out, mine, one_step=case == "exchange")
        if wrong:
            faults.append(f"step {step}: {wrong}")
        os.chdir("/")
        if not killed:
            break
        step += 1
    sys.stdout.write(json.dumps({"moments": step, "seen": sorted(map(str, seen)), "faults": faults}))


if __name__ == "__main__":
    main(*sys.argv[1:])
