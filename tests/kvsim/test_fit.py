"""Models that do not fit: said in words by `explain`, refused with the numbers by `simulate`."""

import pytest

from kvsim.__main__ import main
from kvsim.explain.fit import misfit
from kvsim.hardware.catalogue import load_gpu

GPU = load_gpu("a100-80g-sxm")
BIG = ["--model", "llama-3.1-70b", "--gpu", "a100-80g-sxm"]


def test_the_words_are_there_from_the_first_byte_that_leaves_no_room() -> None:
    usable = GPU.memory_bytes * 9 // 10
    assert misfit("m", GPU, 1, 0.9, usable - 1) is None
    assert "72 GiB usable" in str(misfit("m", GPU, 1, 0.9, usable))


@pytest.mark.parametrize("mode", [["--policy", "full", "--policy", "quest"], ["--paper"], ["--pp", "1"]])
def test_explain_says_it_once(mode: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *BIG, "--context", "4k", *mode]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "do not fit" in line]
    assert len(notes) == 1
    assert "131.4 GiB" in notes[0]


def test_a_context_too_long_for_one_sequence_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "llama-3.1-8b", "--context", "1M", "--policy", "full"]) == 0
    assert "full at 1,000,000 tokens: not one sequence fits beside the weights" in capsys.readouterr().err
    assert main(["explain", *BIG, "--tp", "4", "--context", "4k", "--policy", "full"]) == 0
    assert "fit" not in capsys.readouterr().err


def test_simulate_refuses_with_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *BIG, "--trace", "mooncake-conversation", "--limit", "2"]) == 2
    error = capsys.readouterr().err
    assert "does not fit: one of 1 x a100-80g-sxm has 72 GiB usable" in error
    assert "131.4 GiB weights" in error
