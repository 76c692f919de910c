"""What was seen of one request, and the file of such records: JSON lines, written as requests end."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

VERSION = 1
"""Of the file, which its first line states under KIND."""

KIND = "kvsim_observe"
FINISHED, TIMEOUT, UNREACHABLE, HTTP, NONSENSE, INTERRUPTED = (
    "finished",
    "timeout",
    "unreachable",
    "http",
    "nonsense",
    "interrupted",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request as its client saw it; times are seconds since the first request was due, None: it never came.

    `sent_s` is when sending began, connecting included, `due_s` when the trace said. `prompt_tokens` and
    `output_tokens` are the server's own counts. `token_s` is empty where only the first and the last were asked for.
    """

    request: int
    status: str
    due_s: float
    sent_s: float
    first_token_s: float | None
    last_token_s: float | None
    end_s: float
    asked_prompt_tokens: int
    asked_output_tokens: int
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    error: str
    token_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        """From sending to the first token; NaN where there is none."""
        return float("nan") if self.first_token_s is None else self.first_token_s - self.sent_s


class RecordFile:
    """An open file that takes records; each line is whole whenever the program ends."""

    def __init__(self, stream: IO[str], about: Mapping[str, Any]) -> None:
        self._stream = stream
        self._write({KIND: VERSION, **about})

    def keep(self, record: Record) -> None:
        """Write a record."""
        found = {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(record).items()}
        found["token_s"] = [round(at_s, 6) for at_s in record.token_s]
        if not record.token_s:
            del found["token_s"]
        self._write(found)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
