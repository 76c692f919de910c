"""Tasks in processes beside each other: what they answer, and what becomes of the others when one dies."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

import pytest
from simulated import random_trace, setup
from worker_tasks import die, fail, know, linger, mark, own_id, square, tokens, tokens_unless_quest

from kvsim.results.summary import summarize
from kvsim.run.executor import Executor, Processes, WorkerDied
from kvsim.run.jobs import Job, answer
from kvsim.run.simulate import simulate
from kvsim.run.sweep import Failure, sweep


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_process_does_one_task_after_another_and_shares_memory() -> None:
    executor: Executor = Processes(2, know, slots := RawArray("q", 3))
    with executor:
        assert executor.free == 2
        assert [executor.submit(square, n).result() for n in range(4)] == [0, 1, 4, 9]
        assert len({executor.submit(own_id).result() for _ in range(4)}) == 1  # as long as one is free
        assert executor.submit(mark, 1).result() == 1  # Ctrl-C is for the program alone
        assert slots[1] not in (0, os.getpid())
    until(lambda: gone(slots[1]))


def test_the_death_of_one_costs_the_task_that_it_held() -> None:
    with Processes(2, know, slots := RawArray("q", 1)) as executor:
        lasting = executor.submit(linger, 0)
        until(lambda: slots[0])
        dead = executor.submit(die)
        assert executor.free == 0
        with pytest.raises(RuntimeError, match="all 2 processes are at work; wait for one of them"):
            executor.submit(square, 1)
        with pytest.raises(WorkerDied):
            dead.result()
        with pytest.raises(OSError, match=r"policy x, seed 3: its process was killed; is there enough memory\?"):
            answer(dead, "policy x, seed 3")
        assert not lasting.done()
        assert executor.submit(square, 7).result() == 49  # by another one in its place
        executor.kill(lasting)
        until(lambda: gone(slots[0]))
        assert executor.free == 2


def test_a_process_that_dies_at_rest_costs_nothing() -> None:
    with Processes(1, know) as executor:
        for number in range(20):
            os.kill(executor.submit(own_id).result(), signal.SIGKILL)
            time.sleep(0.002 * number)  # the death is heard before the next task, or after
            with suppress(WorkerDied):  # not heard yet
                assert executor.submit(square, number).result(timeout=20) == number**2


def test_leaving_ends_what_is_at_work() -> None:
    slots = RawArray("q", 1)

    def interrupted() -> None:
        with Processes(1, know, slots) as executor:
            executor.submit(linger, 0)
            until(lambda: slots[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    until(lambda: gone(slots[0]))


@pytest.mark.parametrize("kind", [ValueError, MemoryError])
def test_what_a_task_raises_bears_the_name_of_its_job(kind: type[Exception]) -> None:
    with Processes(1, know) as executor:
        task = executor.submit(fail, kind, "too long")
        with pytest.raises(kind, match=r"^policy full: (too long|this takes more memory than there is)"):
            answer(task, "policy full")


def test_a_bug_is_told_from_bad_input() -> None:
    with Processes(1, know) as executor:
        task = executor.submit(fail, KeyError, "x")
        with pytest.raises(RuntimeError, match="policy full: its process failed, as said above"):
            answer(task, "policy full")
        assert executor.submit(square, 3).result() == 9


def test_an_answer_and_a_question_of_many_bytes() -> None:
    with Processes(1, know) as executor:
        assert executor.submit(bytes.upper, b"a" * 5_000_000).result() == b"A" * 5_000_000


SHORT = [random_trace(seed, 3, prompts=(300, 900)) for seed in range(4)]


def untimed(summary: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in summary.items() if name not in ("wall_s", "cpu_s", "setup_cpu_s")}


def test_a_sweep_answers_each_job_as_it_would_run_alone() -> None:
    jobs = [Job(each, setup(policy)) for each in SHORT for policy in ("full", "quest", "shadowkv")]
    found = dict(sweep(iter(jobs), summarize))
    assert sorted(found) == list(range(12))
    for index, job in enumerate(jobs):
        summary = found[index]
        assert not isinstance(summary, Failure)
        assert untimed(summary) == untimed(summarize(simulate(job.trace, job.setup)))
        assert 0 <= summary["setup_cpu_s"] < 10  # its own, not that of the jobs before


def test_a_job_that_cannot_run_costs_itself_alone() -> None:
    jobs = [Job(SHORT[0], setup()), Job(SHORT[2], setup(sessions="closed")), Job(SHORT[1], setup())]
    found = dict(sweep(jobs, tokens))
    assert found[1] == Failure("policy full: trace 'test' has no sessions; replay it with sessions=open")
    assert [found[0], found[2]] == [int(SHORT[0].output_tokens.sum()), int(SHORT[1].output_tokens.sum())]


def test_of_a_batch_whose_process_dies_all_but_the_culprit_are_answered() -> None:
    policies = ["full"] * 9 + ["quest"] + ["full"] * 10
    jobs = [Job(SHORT[0], setup(policy), seed) for seed, policy in enumerate(policies)]
    found = dict(sweep(jobs, tokens_unless_quest, Processes(1, know)))
    reason = "policy quest, seed 9: its process was killed; is there enough memory?"
    assert found.pop(9) == Failure(reason, was_killed=True)
    assert found == dict.fromkeys([*range(9), *range(10, 20)], int(SHORT[0].output_tokens.sum()))


def test_a_sweep_takes_jobs_as_it_needs_them_and_ends_when_it_is_closed() -> None:
    taken = []

    def endless():
        for number in count():
            taken.append(number)
            yield Job(SHORT[0], setup(), number)

    found = sweep(endless(), tokens)
    assert {next(found)[1] for _ in range(30)} == {int(SHORT[0].output_tokens.sum())}
    found.close()
    assert 30 <= len(taken) < 2000
