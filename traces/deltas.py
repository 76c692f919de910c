"""Turns of sessions that state only what is new in them: whether they do, and the whole prompts that follow.

AIPerf replays a session as a chat: a turn's `input_length` and `hash_ids` are those of its own message, and the server
gets all messages and answers before it as well (ai-dynamo/aiperf, `docs/traces/inference-day-2026/dataset.jsonl` at
commit 988d33bc, 2026). Dynamo's tools write whole prompts under the same names, and call the other form deltas.
"""

from __future__ import annotations

import numpy as np

from traces.checks import Rows
from traces.schema import MAX_TOKENS, Codes, Ints, TraceError

TURNS = ("", "whole", "delta")
MAX_BLOCKS = 1 << 28
NOBODY = -1


def checked_turns(turns: str) -> str:
    """What turns hold: one of TURNS; "" is to be told from the figures. Raises TraceError."""
    if turns not in TURNS:
        raise TraceError(f"turns={turns[:80]}: must be whole (each prompt as a whole) or delta (what is new in it)")
    return turns


def turns_before(session: Codes) -> Ints:
    """The row of the turn before each one, in order of the file; -1 for a session's first and for no session."""
    before = np.full(len(session), NOBODY, np.int64)
    latest: dict[int, int] = {}
    for i, whose in enumerate(session.tolist()):
        if whose >= 0:
            before[i] = latest.get(whose, NOBODY)
            latest[whose] = i
    return before


def are_deltas(rows: Rows, prompt: Ints, output: Ints, ids: list[Ints], before: Ints) -> bool:
    """Whether later turns state only what is new; TraceError asks where the figures leave both.

    A whole prompt begins with the block that the turn before began with, and is longer than that and its answer.
    """
    later = np.flatnonzero((before >= 0) & rows.good & rows.good[before])
    if not len(later):
        return False
    earlier = before[later]
    grows = prompt[later] > prompt[earlier] + output[earlier]
    pairs = zip(later.tolist(), earlier.tolist(), strict=True) if ids else ()
    same = [ids[i][0] == ids[j][0] for i, j in pairs if len(ids[i]) and len(ids[j])] if ids else []
    if (same and all(same)) or (not same and grows.all()):
        return False
    if same and not any(same) and not grows.all():
        return True
    raise TraceError(
        f"{rows.table.source}: turns of sessions could be whole prompts or only what is new in each; say which with "
        "the option turns=whole or turns=delta"
    )


def whole(
    rows: Rows, field: str, prompt: Ints, output: Ints, before: Ints, ids: list[Ints], block_tokens: int = 0
) -> Ints:
    """The lengths of whole prompts from those in a field; with blocks, `ids` become those of whole prompts too.

    Blocks of a first turn keep their ids, also a partial tail. Those behind have ids of their session alone, since an
    id stands for all that is before it; tails have none. A turn behind one that is bad is bad.
    """
    good, lengths = rows.good, np.array(prompt)
    lost = np.zeros(len(prompt), np.bool_)
    for i, j in enumerate(before.tolist()):
        if j >= 0:
            lengths[i] = min(lengths[j] + int(output[j]) + int(prompt[i]), 2 * MAX_TOKENS)
            lost[i] = lost[j] or not good[j]
    rows.reject(field, lost, "follows a turn of its session that is bad; correct that one or skip bad rows")
    rows.reject(field, lengths > MAX_TOKENS, f"makes a prompt of more than {MAX_TOKENS:,} tokens with its turns")
    if not block_tokens:
        return lengths
    full = lengths // block_tokens
    if int(full[rows.good].sum()) > MAX_BLOCKS:
        raise TraceError(f"{rows.table.source}: more than {MAX_BLOCKS:,} blocks of whole prompts; shorten the sessions")
    flat = np.unique(np.concatenate([np.empty(0, np.uint64), *(row.astype(np.uint64) for row in ids)]))
    unused = len(flat)
    for i, j in enumerate(before.tolist()):
        if j < 0:
            ids[i] = np.searchsorted(flat, ids[i].astype(np.uint64))
        elif rows.good[i]:
            known = ids[j][: full[j]]
            ids[i] = np.concatenate([known, np.arange(unused, unused + full[i] - len(known))])
            unused += int(full[i]) - len(known)
    return lengths
