"""A journal has each finding that was added, whatever tears it, and nothing that was not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.run.journal import Journal

FINDINGS = {"a": {"x": 1, "y": None}, "b": {"x": 0.1 + 0.2, "text": "line\nbreak \udc80 <b>"}, "c": [1, 2]}


def written(path: Path) -> bytes:
    with Journal(path) as journal:
        for key, finding in FINDINGS.items():
            journal.add(key, finding)
    return path.read_bytes()


def test_findings_are_read_as_they_were(tmp_path: Path) -> None:
    written(tmp_path / "j")
    with Journal(tmp_path / "j") as journal:
        assert journal.found == FINDINGS


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("journal") / "j"
    return path, written(path)


@given(data=st.data())
def test_a_torn_or_damaged_journal_has_its_whole_lines(whole: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = whole
    end = data.draw(st.integers(0, len(content)))
    damaged = bytearray(content[:end])
    flips = data.draw(st.lists(st.integers(0, max(0, end - 1)), max_size=2)) if end else []
    for place in flips:
        damaged[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    lines = content.split(b"\n")[:-1]
    untouched = [line in bytes(damaged).split(b"\n") for line in lines]
    with Journal(path) as journal:
        expected = {
            key: finding for (key, finding), is_there in zip(FINDINGS.items(), untouched, strict=True) if is_there
        }
        assert journal.found == expected
        journal.add("d", 4)
    with Journal(path) as journal:
        assert journal.found == {**expected, "d": 4}


def test_a_settled_journal_is_as_if_written_in_that_order(tmp_path: Path) -> None:
    content = written(tmp_path / "one")
    with Journal(tmp_path / "two") as journal:
        for key in ("c", "stale", "a", "b"):
            journal.add(key, FINDINGS.get(key))
        journal.settle(["a", "b", "a", "c"])
    assert (tmp_path / "two").read_bytes() == content
