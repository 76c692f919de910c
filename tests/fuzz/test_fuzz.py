"""Five hundred mutated inputs, the same in every run; `make fuzz` tries ten thousand."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from fuzz import mutate
from fuzz.campaign import README, RESULT, counted_in, kinds, several
from fuzz.door import attempt_command

NUMBER = 500


@pytest.mark.parametrize("kind", kinds())
def test_no_input_ends_in_a_traceback(kind: str) -> None:
    share = -(-NUMBER // len(kinds()))
    outcomes: Counter[str] = Counter()
    failures = list(several(kind, 0, 0, share, outcomes))
    assert not failures
    assert sum(outcomes.values()) == share
    assert set(outcomes) <= {"read", "refused", "unmet"}
    assert outcomes["refused"]  # the mutations do break something


def test_the_readme_says_how_many_were_tried() -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    assert sum(sum(outcomes.values()) for outcomes in found["outcomes"].values()) == found["inputs"]
    assert set().union(*found["outcomes"].values()) <= {"read", "refused", "unmet"}
    readme = README.read_text(encoding="utf-8")
    assert f"{found['inputs']:,} mutated inputs" in readme
    assert counted_in(readme, found["inputs"]) == readme


def test_every_kind_of_input_is_tried() -> None:
    assert {"counts", "flags", "hardware", "models", "policies", "scenarios", "tenants", "traces"} <= set(kinds())


def test_mutations_depend_on_the_seed_alone_and_leave_the_original() -> None:
    original = {"a": [1, 2.5, {"b": "text"}], "c": None}
    before = json.dumps(original)
    changed = [repr(mutate.document(random.Random(seed), original)) for seed in range(50)]
    assert changed == [repr(mutate.document(random.Random(seed), original)) for seed in range(50)]
    assert json.dumps(original) == before
    assert len(set(changed)) > 25


@pytest.mark.parametrize(
    ("args", "broken"),
    [
        (["model", "show", "config.json"], "RecursionError"),
        (["trace", "info", "t.csv"], "RuntimeWarning"),
    ],
)
def test_the_door_notices_what_a_command_must_not_do(
    args: list[str], broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that is no answer to bad input, whichever command raises it."""

    def breaks(*_: object, **__: object) -> None:
        raise {"RecursionError": RecursionError, "RuntimeWarning": RuntimeWarning}[broken]("as a fault would")

    monkeypatch.setattr("kvsim.models.load_model", breaks)
    monkeypatch.setattr("traces.load", breaks)
    with pytest.raises(AssertionError, match=broken):
        attempt_command(args, tmp_path)


@pytest.mark.parametrize(
    ("message", "broken"),
    [
        ("'utf-8' codec can't decode byte 0xff; write it as UTF-8", "said by a library"),
        ("x" * 300 + " must be y " + "z" * 300, None),
        ("nothing that helps", "neither a rule nor a fix"),
    ],
)
def test_the_door_reads_errors(
    message: str, broken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise ValueError(message)

    monkeypatch.setattr("kvsim.models.load_model", refuses)
    if broken is None:
        assert attempt_command(["model", "show", "x"], tmp_path) == "refused"
        return
    with pytest.raises(AssertionError, match=broken):
        attempt_command(["model", "show", "x"], tmp_path)


def test_the_door_notices_what_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves(*_: object, **__: object) -> None:
        Path(".half.tmp").touch()
        raise ValueError("it must not be left")

    monkeypatch.setattr("kvsim.models.load_model", leaves)
    with pytest.raises(AssertionError, match=r"failed, and left \['\.half\.tmp'\]"):
        attempt_command(["model", "show", "x"], tmp_path)
