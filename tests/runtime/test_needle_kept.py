"""The shipped model in the user's cache: unpacked once, never half, never damaged, and without a cache as well."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("torch")

from safetensors import safe_open

from runtime.loading import NEEDLE, model_folder
from runtime.needle import expand
from runtime.needle.kept import kept


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache for the time of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvsim"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, to see what is left in it."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def same_model(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same bytes of a model."""
    names = sorted(path.name for path in other.iterdir())
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_it_is_unpacked_once(cache: Path, elsewhere: Path, tmp_path: Path) -> None:
    with model_folder(NEEDLE) as first:
        assert first.parent == cache
        assert same_model(first, expand(tmp_path / "expected"))
        written = first.stat().st_mtime_ns
    with model_folder(NEEDLE) as second:
        assert (second, second.stat().st_mtime_ns) == (first, written)
    assert [path.name for path in cache.iterdir()] == [first.name]
    assert list(elsewhere.iterdir()) == []
    assert cache.stat().st_mode & 0o777 == 0o700


def test_what_is_damaged_is_unpacked_anew(cache: Path, tmp_path: Path) -> None:
    expected, weights = expand(tmp_path / "expected"), kept() / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one weight: nothing would notice
    for damaged in (bytes(content), content[: len(content) // 2], b""):
        weights.write_bytes(damaged)
        assert same_model(kept(), expected)
    (weights.parent / "sha256.json").write_text("{}")
    assert same_model(kept(), expected)
    (weights.parent / "config.json").unlink()
    assert same_model(kept(), expected)
    assert [path.name for path in cache.iterdir()] == [weights.parent.name]


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    for name, age_s in ((".unfinished-old", 7200), (".unfinished-new", 10)):
        (cache / name / "model").mkdir(parents=True)
        os.utime(cache / name, (time.time() - age_s,) * 2)
    kept()
    assert sorted(path.name for path in cache.glob(".*")) == [".unfinished-new"]


def test_several_at_once(cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        (folder,) = {future.result() for future in [pool.submit(kept) for _ in range(4)]}
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert kept() == folder


def test_without_a_cache_it_is_unpacked_for_the_time_being(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with model_folder(NEEDLE) as folder:
        assert folder.is_relative_to(elsewhere)
        with safe_open(folder / "model.safetensors", framework="np") as weights:
            assert len(weights.keys()) > 0
    assert list(elsewhere.iterdir()) == []
