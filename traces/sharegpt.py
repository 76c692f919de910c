"""ShareGPT's conversations, and others in that form: turns of known numbers of characters, without times or tokens.

Format: a list of {"id", "conversations": [{"from": "human" or "gpt", "value"}]}, as vLLM's and SGLang's benchmarks read
it; `role` and `content` are read for `from` and `value`. Texts are counted while the file is read, and not kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from traces.checks import Rows
from traces.schema import MAX_TOKENS, Trace, TraceError
from traces.table import Table
from traces.tabular import finish
from traces.untimed import checked_rate, poisson_s

COLUMN = "conversations"
ASKING, ANSWERING, BEFORE = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard"), ("system",)
TURNS = ("", "all", "first")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What conversations do not say: all of it must be stated.

    `chars_per_token` estimates lengths; `rate_rps` is how many conversations begin in a second; `turns` "first" takes
    the first exchange of each, "all" all of them, each `think_s` after the answer before.
    """

    chars_per_token: float = 0.0
    rate_rps: float = 0.0
    turns: str = ""
    think_s: float = -1.0

    def __post_init__(self) -> None:
        checked_rate(self.rate_rps)
        if not (math.isfinite(self.chars_per_token) and self.chars_per_token >= 0):
            raise TraceError(f"chars_per_token={self.chars_per_token}: must be finite and above 0")
        if self.turns not in TURNS:
            raise TraceError(f"turns={self.turns[:80]}: must be first or all")
        if not math.isfinite(self.think_s) or (self.think_s < 0 and self.think_s != -1):
            raise TraceError(f"think_s={self.think_s}: must be finite and not negative")


def load(table: Table, options: Options, *, name: str, seed: int = 0, skip_bad_rows: bool = False) -> Trace:
    """The exchanges of the conversations, a session each; a prompt is all that was said before and the question."""
    if not options.chars_per_token:
        raise TraceError(
            f"{table.source}: holds texts, no tokens; say how many characters a token has: chars_per_token=4 "
            "(or count them with the model's tokenizer, and give a table)"
        )
    exchanges = [list(_exchanges(cell, options.chars_per_token)) for cell in table.columns[COLUMN]]
    if not options.turns and any(len(own) > 1 for own in exchanges):
        raise TraceError(
            f"{table.source}: conversations have up to {max(map(len, exchanges))} turns; say turns=first, or turns=all "
            "and think_s, the seconds between an answer and the next turn"
        )
    if options.turns == "all" and options.think_s < 0:
        raise TraceError(f"{table.source}: turns=all needs think_s, the seconds between an answer and the next turn")
    if options.turns == "first":
        exchanges = [own[:1] for own in exchanges]
    starts_s, note = poisson_s(
        len(exchanges), options.rate_rps, seed, f"{table.source}: ShareGPT records no times", "conversations"
    )
    turns = [
        (line, number, turn, *lengths)
        for number, (line, own) in enumerate(zip(table.lines, exchanges, strict=True))
        for turn, lengths in enumerate(own)
    ]
    if not turns:
        raise TraceError(f"{table.source}: empty trace: no conversation has a question and its answer")
    lines, session, turn, prompt, output = (list(column) for column in zip(*turns, strict=True))
    columns: dict[str, list[Any]] = {"human": prompt, "gpt": output}
    rows = Rows(Table(source=table.source, columns=columns, lines=lines), skip_bad_rows=skip_bad_rows)
    rows.table.skipped_rows = table.skipped_rows
    later = np.array(turn) > 0
    prompts, outputs = (rows.whole(field, minimum=1) for field in columns)
    think_s = np.where(later, options.think_s, np.nan)
    notes = [note, f"lengths are estimated at {options.chars_per_token:g} characters a token"]
    skipped = sum(not own for own in exchanges)
    if skipped:
        notes.append(f"{skipped} conversations without a question and its answer were left out")
    if later.any():
        notes.append("later turns are placed as if answers took no time; replay them with --sessions closed")
    return finish(
        rows,
        name=name,
        arrival_s=starts_s[session] + np.array(turn) * max(0.0, options.think_s),
        prompt=prompts,
        output=outputs,
        session=np.array(session, np.int32),
        think_s=think_s,
        notes=tuple(notes),
    )


def _exchanges(cell: Any, chars_per_token: float) -> Iterator[tuple[int, int]]:
    """(prompt tokens, output tokens) of each question with an answer; what was said before is part of a prompt.

    A conversation ends at a turn of somebody else, or one without text.
    """
    before = asked = 0
    for turn in cell if isinstance(cell, list) else ():
        chars = turn["chars"] if turn else None
        whose = turn["from"] if turn else None
        if chars is None or whose not in (*ASKING, *ANSWERING, *BEFORE):
            return
        tokens = min(math.ceil(chars / chars_per_token), MAX_TOKENS + 1)
        if whose in ANSWERING and asked:
            yield before, tokens
        asked = asked + tokens if whose in ASKING else 0
        before += tokens
