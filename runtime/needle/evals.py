"""The shipped examples: long prompts with known answers."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

EVALS = Path(__file__).parent / "evals.npz"
NEWLINE, QUESTION = 201, (6105, 410, 286)  # the tokens of a line's end and of "Question"
TASKS = ("niah_single", "niah_multikey", "niah_multiquery", "vt", "kv_recall")


class Example(NamedTuple):
    """One prompt and its answer; right when greedy decoding produces every scored token in its place."""

    task: str
    length_tokens: int  # of prompt and answer together
    depth: float  # where the needle lies: 0 at the start of the prompt, 1 at its end
    prompt: np.ndarray  # int64 (prompt_tokens,)
    answer: np.ndarray  # int64 (answer_tokens,)
    scored: np.ndarray  # bool (answer_tokens,)

    @property
    def question_tokens(self) -> int:
        """How many tokens at the prompt's end ask: from the line "Question:" on, or the last line where none is."""
        ids = self.prompt.tolist()
        starts = [i for i in range(len(ids) - len(QUESTION)) if tuple(ids[i : i + len(QUESTION)]) == QUESTION]
        if starts:
            return len(ids) - starts[-1]
        last: int = ids[::-1].index(NEWLINE)
        return last

    def correct(self, produced: np.ndarray) -> bool:
        """Whether `produced` (answer_tokens,) or longer has every scored token in its place."""
        if len(produced) < len(self.answer):
            raise ValueError(
                f"produced has {len(produced)} tokens, the answer {len(self.answer)}; generate at least as many"
            )
        return bool((produced[: len(self.answer)] == self.answer)[self.scored].all())


def load_evals(tasks: Collection[str] = TASKS, max_tokens: int = 32768) -> list[Example]:
    """The examples of `tasks` of at most `max_tokens`, in the order of the file: ten for each task and length.

    Lengths are 2048, 8192, 16384 and 32768 tokens. `ValueError` for an unknown task.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task {task!r} is unknown; the tasks are {', '.join(TASKS)}")
    with np.load(EVALS, allow_pickle=False) as packed:
        names, rows = packed["tasks"], packed["rows"]
        tokens, scored = packed["tokens"].astype(np.int64), packed["scored"]
    answer_ends = np.cumsum(rows[:, 4])
    examples = []
    for (task, length, offset, prompt, answer, depth), answer_end in zip(rows.tolist(), answer_ends, strict=True):
        name = str(names[task])
        if name in tasks and length <= max_tokens:
            split, end = offset + prompt, offset + prompt + answer
            marks = scored[answer_end - answer : answer_end]
            examples.append(Example(name, length, depth / 1000, tokens[offset:split], tokens[split:end], marks))
    return examples
