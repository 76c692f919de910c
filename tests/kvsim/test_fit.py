"""Models that do not fit: said in words by `explain`, refused with the numbers by `simulate`."""

from dataclasses import replace

import pytest
from simulated import setup

from kvsim.__main__ import main
from kvsim.explain.fit import misfit
from kvsim.hardware.catalogue import load_gpu

GPU = load_gpu("a100-80g-sxm@eager")
BIG = ["--model", "llama-3.1-70b", "--gpu", "a100-80g-sxm"]


def test_the_words_are_there_from_the_first_byte_that_leaves_no_room() -> None:
    assert misfit("m", GPU, 1, GPU.memory_bytes - 1) is None
    assert "has 80 GiB, and its part of the weights is 80 GiB" in str(misfit("m", GPU, 1, GPU.memory_bytes))
    s = setup(gpu=GPU)
    taken_bytes = s.rank.weight_bytes + s.reserve_bytes[0]
    fitting = replace(GPU, memory_bytes=taken_bytes + 1, device_bytes=None)
    assert setup(gpu=fitting, gpu_memory_utilization=1.0).capacity()[0] == 1
    tight = setup(gpu=replace(fitting, memory_bytes=taken_bytes), gpu_memory_utilization=1.0)
    assert "llama-3.1-8b does not fit" in str(tight.gpu_memory.misfit)
    with pytest.raises(ValueError, match=r"llama-3\.1-8b does not fit"):
        tight.capacity()


@pytest.mark.parametrize("mode", [["--policy", "full", "--policy", "quest"], ["--paper"], ["--pp", "1"]])
def test_explain_says_it_once(mode: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *BIG, "--context", "4k", *mode]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "does not fit" in line]
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
    assert "does not fit: one of 1 x a100-80g-sxm has 71.24 GiB usable" in error
    assert "131.4 GiB weights" in error
