"""Recorded counts: what is saved comes back, shares and totals are those of the definition, other files are refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.counts import COLUMNS, Drawn, Recording

STEPS = np.array([[0, 0, 9, 9, 0, 9], [1, 0, 9, 9, 0, 9], [0, 0, 9, 9, 9, 1], [1, 0, 9, 9, 9, 1]], dtype=np.int64)


def drawn(row: list[int], value: list[list[int]], maximum: list[list[int]]) -> Drawn:
    return Drawn(*(np.array(part, dtype=np.int64) for part in (row, value, maximum)))


MISS = drawn([2, 3], [[1, 0], [3, 4]], [[4, 4], [4, 4]])
RECORDING = Recording(STEPS, {"miss": MISS, "h0.keep": drawn([3], [[5, 0]], [[20, 0]])})


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    """Any recording: a few steps, and counts that some of them drew."""
    whole = st.integers(1, 2**40)
    n = draw(st.integers(0, 6))
    steps = np.array([draw(st.tuples(*(whole for _ in COLUMNS))) for _ in range(n)], dtype=np.int64)
    counts = {}
    for name in draw(st.sets(st.sampled_from(["miss", "keep", "h0.miss", "h1.miss"]))):
        rows = draw(st.lists(st.integers(0, n - 1), unique=True)) if n else []
        heads = draw(st.integers(1, 3))
        maximum = [[draw(st.integers(0, 2**20)) for _ in range(heads)] for _ in rows]
        value = [[draw(st.integers(0, most)) for most in row] for row in maximum]
        shaped = (np.array(part, dtype=np.int64).reshape(len(rows), heads) for part in (value, maximum))
        counts[name] = Drawn(np.array(rows, dtype=np.int64), *shaped)
    return Recording(steps.reshape(n, len(COLUMNS)), counts)


@given(recordings())
def test_what_is_saved_comes_back(tmp_path_factory: pytest.TempPathFactory, recording: Recording) -> None:
    path = tmp_path_factory.mktemp("counts") / "run.npz"
    recording.save(path)
    back = Recording.load(path)
    assert np.array_equal(back.steps, recording.steps)
    assert back.counts.keys() == recording.counts.keys()
    for name, counted in recording.counts.items():
        for one, other in zip(counted, back.counts[name], strict=True):
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)


@given(recordings())
def test_totals_and_shares_are_sums_over_heads(recording: Recording) -> None:
    totals, shares = recording.totals(), recording.shares()
    assert len(totals) == len(recording.steps)
    for name, (row, value, maximum) in recording.counts.items():
        assert {r: t[name] for r, t in enumerate(totals) if name in t} == {
            r: sum(heads) for r, heads in zip(row.tolist(), value.tolist(), strict=True)
        }
        most = sum(sum(heads) for heads in maximum.tolist())
        assert shares[name] == (sum(sum(heads) for heads in value.tolist()) / most if most else 0.0)


def test_heads_that_a_layer_lacks_do_not_count() -> None:
    assert RECORDING.shares() == {"miss": 8 / 16, "h0.keep": 5 / 20}
    assert RECORDING.totals() == [{}, {}, {"miss": 1}, {"miss": 7, "h0.keep": 5}]


def arrays(**changes: object) -> dict[str, np.ndarray]:
    """The arrays of a sound file, with some replaced, or left out where None."""
    sound: dict[str, object] = {"steps": STEPS, "miss.row": MISS.row, "miss.value": MISS.value}
    sound |= {"miss.maximum": MISS.maximum}
    sound |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: np.asarray(value) for name, value in sound.items() if value is not None}


def with_steps(row: int, column: str, value: int) -> np.ndarray:
    steps = STEPS.copy()
    steps[row, COLUMNS.index(column)] = value
    return steps


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (arrays(steps=None), "'steps' must be int64 rows of sequence, layer, first_prompt_tokens, "),
        (arrays(steps=STEPS.astype(np.float64)), "'steps' must be int64 rows"),
        (arrays(steps=STEPS[:, :5]), "'steps' must be int64 rows"),
        (arrays(steps=STEPS.ravel()), "'steps' must be int64 rows"),
        (arrays(steps=with_steps(0, "layer", -1)), "'steps' has a number below 0, 0, 1, 1, 0, 1"),
        (arrays(steps=with_steps(0, "new_tokens", 0)), "'steps' has a number below"),
        (arrays(miss__value=None), "count 'miss' needs int64 arrays row, value, maximum"),
        (arrays(miss__row=MISS.row.astype(np.int32)), "count 'miss' needs int64 arrays"),
        (arrays(miss__row=MISS.row[:1]), "count 'miss' needs a row of values for each"),
        (arrays(miss__row=MISS.row[:, None]), "count 'miss' needs a row of values for each"),
        (arrays(miss__value=MISS.value[:, 0]), "count 'miss' needs a row of values for each"),
        (arrays(miss__maximum=MISS.maximum[:, :1]), "count 'miss' needs a maximum for each value"),
        (arrays(miss__row=np.array([2, 4])), "count 'miss' names a row that 'steps' does not have, or one twice"),
        (arrays(miss__row=np.array([2, -1])), "count 'miss' names a row that 'steps' does not have"),
        (arrays(miss__row=np.array([2, 2])), "count 'miss' names a row that 'steps' does not have, or one twice"),
        (arrays(miss__value=MISS.value - 1), "count 'miss' has values outside 0 and its maximum"),
        (arrays(miss__value=MISS.value + 1), "count 'miss' has values outside 0 and its maximum"),
        (arrays(miss__spread=MISS.row), "'miss.spread' belong to no count"),
        (arrays(note=MISS.row), "count '' needs int64 arrays"),
    ],
)
def test_what_is_no_recording_says_why(tmp_path: Path, found: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "run.npz"
    np.savez(path, **found)
    with pytest.raises(ValueError, match=message) as error:
        Recording.load(path)
    assert str(error.value).startswith(f"{path}: ")


def truncated(path: Path) -> None:
    RECORDING.save(path)
    path.write_bytes(path.read_bytes()[:-40])


def damaged(path: Path) -> None:
    RECORDING.save(path)
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40)
    path.write_bytes(bytes(content))


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, STEPS)


@pytest.mark.parametrize(
    "write",
    [
        truncated,
        damaged,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("name=share"),
        one_array,
        lambda path: np.savez(path, steps=np.array([{"pickled": 1}], dtype=object)),
        Path.mkdir,
    ],
)
def test_other_files_are_refused(tmp_path: Path, write: Callable[[Path], object]) -> None:
    path = tmp_path / "run.npz"
    write(path)
    with pytest.raises(ValueError, match=r"run\.npz: not a recording of counts \("):
        Recording.load(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file; record one with `kvsim generate --counts-out FILE`"):
        Recording.load(tmp_path / "none.npz")
