"""What a run of the load generator comes to: how many requests ended how, their latencies, and what is odd about it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsim.observed.record import FINISHED, INTERRUPTED, Record
from kvsim.text.units import format_s

_LATE_S = 0.05  # beyond which a request was sent at another time than the trace says
_PERCENTILES = (50, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A run in numbers (`document`), in words (`facts`), and what its reader should know (`warnings`)."""

    finished: int
    commonest: str  # of what failed requests said
    document: dict[str, Any]
    facts: dict[str, str]
    warnings: list[str]


def seen_of(records: Sequence[Record], asked: int) -> Seen:
    """A run of `asked` requests, those with a record."""
    done = [one for one in records if one.status == FINISHED]
    failed = [one for one in records if one.status not in (FINISHED, INTERRUPTED)]
    errors = Counter(one.error for one in failed).most_common(1)
    statuses = dict(Counter(one.status for one in records))
    latencies = {
        "ttft_s": [one.ttft_s for one in done],
        "tpot_s": [tpot for one in done if (tpot := _tpot_s(one)) is not None],
        "e2e_s": [one.end_s - one.sent_s for one in done],
    }
    document: dict[str, Any] = {
        "requests": asked,
        "sent": len(records),
        "statuses": statuses,
        "prompt_tokens": sum(one.prompt_tokens or 0 for one in done),
        "output_tokens": sum(one.output_tokens or 0 for one in done),
        "latencies": {
            name: {f"p{p}": float(np.percentile(values, p, method="inverted_cdf")) for p in _PERCENTILES}
            for name, values in latencies.items()
            if values
        },
    }
    facts = {status: f"{count:,}" for status, count in statuses.items() if status != FINISHED}
    for name, percentiles in document["latencies"].items():
        facts[name.removesuffix("_s").upper()] = ", ".join(f"{p} {format_s(s)}" for p, s in percentiles.items())
    facts["tokens"] = f"{document['prompt_tokens']:,} in, {document['output_tokens']:,} out"
    return Seen(
        finished=len(done),
        commonest=errors[0][0] if errors else "they were interrupted",
        document=document,
        facts=facts,
        warnings=_warnings(done, failed, records, errors[0][0] if errors else ""),
    )


def _tpot_s(record: Record) -> float | None:
    """Mean time between tokens; None where there is one token, or nobody counted them."""
    if record.first_token_s is None or record.last_token_s is None or (record.output_tokens or 0) < 2:
        return None
    return (record.last_token_s - record.first_token_s) / ((record.output_tokens or 0) - 1)


def _warnings(done: Sequence[Record], failed: Sequence[Record], records: Sequence[Record], commonest: str) -> list[str]:
    found = []
    if failed and done:
        found.append(f"{len(failed):,} requests failed: the results are partial; most often: {commonest}")
    late = [one.sent_s - one.due_s for one in records if one.sent_s - one.due_s > _LATE_S]
    if late:
        found.append(
            f"{len(late):,} requests were sent late, by {format_s(max(late))} at the most: --max-in-flight, or this "
            "machine, held them up"
        )
    uncounted = sum(one.prompt_tokens is None or one.output_tokens is None for one in done)
    if uncounted:
        found.append(f"the server did not count the tokens (usage) of {uncounted:,} requests")
    short = sum(one.output_tokens is not None and one.output_tokens < one.asked_output_tokens for one in done)
    if short:
        found.append(f"{short:,} answers are shorter than the trace's, as the model ended them")
    off = [abs(one.prompt_tokens / one.asked_prompt_tokens - 1) for one in done if one.prompt_tokens is not None]
    if off and float(np.median(off)) > 0.1:
        found.append(f"prompts have other lengths than the trace's, by {np.median(off):.0%} in the middle")
    return found
