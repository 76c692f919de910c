"""Which turn of a session each request goes on from, and what is known of sessions on average."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvsim.engine.state.cluster import NOBODY, Ints
from traces import Trace
from traces.sessions import followers


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """For each request its `parent` (-1: none), with `shared_tokens` of whose state its prompt begins.

    `think_s` is the mean time from the end of a turn to the next one's arrival (where the trace has no think times,
    from its arrival), and `return_share` the share of turns that another one goes on from.
    """

    parent: Ints
    shared_tokens: Ints
    in_session: NDArray[np.bool_]
    think_s: float
    return_share: float


def find_turns(trace: Trace) -> Turns:
    """Turns of a trace, whose sessions are known.

    With block ids the parent is the last request of the session that has the longest leading run of blocks in common,
    which is what they share. Without, it is the request that this one waited for, all of it, if the prompt is as long
    as that context. The state of a turn lacks its last output token, and a prompt always computes a token itself.
    """
    parent, shared_tokens = np.full(len(trace), NOBODY), np.zeros(len(trace), np.int64)
    in_session = trace.session >= 0
    contexts = trace.prompt_tokens + trace.output_tokens - 1
    waits = followers(trace)
    if trace.block_tokens:
        _by_blocks(trace, parent, shared_tokens)
    else:
        goes_on = (waits.leader != NOBODY) & (trace.prompt_tokens > contexts[waits.leader])
        parent[goes_on] = waits.leader[goes_on]
        shared_tokens[goes_on] = contexts[waits.leader[goes_on]]
    shared_tokens = np.minimum(shared_tokens, np.minimum(contexts[parent], trace.prompt_tokens - 1))
    parent[shared_tokens <= 0] = NOBODY
    shared_tokens[parent == NOBODY] = 0
    has = parent != NOBODY
    gaps_s = np.where(np.isnan(trace.think_s), trace.arrival_s - trace.arrival_s[parent], trace.think_s)[has]
    share = len(np.unique(parent[has])) / max(1, int(in_session.sum()))
    return Turns(parent, shared_tokens, in_session, float(gaps_s.mean()) if len(gaps_s) else 0.0, share)


def _by_blocks(trace: Trace, parent: Ints, shared_tokens: Ints) -> None:
    latest: defaultdict[int, dict[int, int]] = defaultdict(dict)  # by session, which request had a block last
    for index in np.flatnonzero(trace.session >= 0).tolist():
        blocks, seen = trace.blocks(index), latest[int(trace.session[index])]
        ids = blocks.tolist()
        deepest = next((block for block in reversed(ids) if block in seen), None)
        if deepest is not None:
            other = seen[deepest]
            theirs = trace.blocks(other)
            both = min(len(blocks), len(theirs))
            differ = np.flatnonzero(blocks[:both] != theirs[:both])
            parent[index] = other
            shared_tokens[index] = trace.block_tokens * (int(differ[0]) if len(differ) else both)
        seen.update(dict.fromkeys(ids, index))
