"""Models by ORG/NAME from a cache laid out as Hugging Face's tools lay it out."""

from pathlib import Path

import pytest

from policies.hf.local_cache import cached_folder, hub_cache, is_hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def snapshot(cache: Path, name: str, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """An empty config.json in a snapshot, and the branch that names it."""
    model = cache / f"models--{name.replace('/', '--')}"
    folder = model / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if ref:
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / ref).write_text(commit)
    return folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(expected)


def test_the_snapshot_of_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot(tmp_path, "org/model-1.5", "f" * 40, ref=None)
    assert cached_folder("org/model-1.5").name == "f" * 40  # the only one
    newest = snapshot(tmp_path, "org/model-1.5")
    assert cached_folder("org/model-1.5") == newest


def test_what_is_not_there_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'org/none' .*: hf download org/none --include '\*\.json', or name"):
        cached_folder("org/none")
    snapshot(tmp_path, "org/two", "a" * 40, ref=None)
    snapshot(tmp_path, "org/two", "b" * 40, ref=None)
    with pytest.raises(ValueError, match="hf download org/two"):
        cached_folder("org/two")


def test_a_branch_that_leads_out_of_the_cache_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot(tmp_path / "hub", "org/model")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "hub" / "models--org--model" / "refs" / "main").write_text("../../..")
    with pytest.raises(ValueError, match="hf download"):
        cached_folder("org/model")


@pytest.mark.parametrize("text", ["a", "a/b/c", "../b", "a/..", "/a", "a/", "a b/c", "a/b;c", "a/" + "b" * 300, "-a/b"])
def test_what_is_no_name(text: str) -> None:
    assert not is_hub_name(text)
    assert is_hub_name("meta-llama/Llama-3.1-8B")
