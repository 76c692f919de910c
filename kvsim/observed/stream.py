"""A streamed answer as its bytes come in: when its tokens came, how many, and how it ended."""

import json
from dataclasses import dataclass, field
from typing import Any

from policies.shown import shown

MOST_LINE_BYTES = 1 << 20
"""The longest line of a stream that is taken for one: a token's event has some hundred bytes."""

DONE = "[DONE]"


class NonsenseError(Exception):
    """What came is no streamed answer of an OpenAI-compatible server; the message says what it is instead."""


@dataclass(slots=True)
class Answer:
    """A streamed answer: bytes are fed in with the time at which they came.

    `token_s` are the times of events that bring tokens; a server may put several tokens into one event.
    `prompt_tokens` and `output_tokens` are the server's own counts, None before it has said them.
    """

    chat: bool
    token_s: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    ended: bool = False  # by the server's own word
    _rest: bytes = b""
    _events: int = 0

    def feed(self, content: bytes, now_s: float) -> None:
        """Take bytes that came at `now_s`; raises NonsenseError."""
        *lines, self._rest = (self._rest + content).split(b"\n")
        if len(self._rest) > MOST_LINE_BYTES:
            raise NonsenseError(f"a line of more than {MOST_LINE_BYTES:,} bytes")
        for line in lines:
            self._take(line, now_s)

    def check_whole(self) -> None:
        """Raise NonsenseError where a stream that has ended was none, or broke off."""
        if not self._events:
            raise NonsenseError(f"no events: {_words(self._rest)}" if self._rest else "an empty answer")
        if not self.ended:
            raise NonsenseError("a stream that broke off before its end")
        if not self.token_s:
            raise NonsenseError("a stream without tokens")

    def _take(self, line: bytes, now_s: float) -> None:
        text = line.decode("utf-8", errors="replace").strip()
        if not text.startswith("data:"):
            if text and not text.startswith((":", "event:", "id:", "retry:")):
                raise NonsenseError(f"{_words(line)} where an event was due")
            return
        self._events += 1
        text = text.removeprefix("data:").strip()
        if text == DONE:
            self.ended = True
            return
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):
            raise NonsenseError(f"{shown(text)} where JSON was due") from None
        if not isinstance(event, dict):
            raise NonsenseError(f"{shown(text)} where a JSON object was due")
        if event.get("error"):
            raise NonsenseError(f"an error: {shown(_message(event['error']))}")
        self._count(event.get("usage"))
        choices = event.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        if isinstance(first, dict):
            if _brings_token(first, chat=self.chat):
                self.token_s.append(now_s)
            self.ended = self.ended or bool(first.get("finish_reason"))

    def _count(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
        for count in (prompt, output):
            if count is not None and (type(count) is not int or not 0 <= count < 1 << 40):
                raise NonsenseError(f"usage of {shown(count)} tokens")
        self.prompt_tokens = self.prompt_tokens if prompt is None else prompt
        self.output_tokens = self.output_tokens if output is None else output
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        self.cached_tokens = cached if type(cached) is int else self.cached_tokens


def _brings_token(choice: dict[str, Any], *, chat: bool) -> bool:
    """Whether an event brings a token: of a completion also one whose text is empty, as a part of a character is."""
    if not chat:
        return isinstance(choice.get("text"), str)
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return False
    said = [delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")]
    return any(said) if "role" in delta else any(part is not None for part in said)


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _words(content: bytes) -> str:
    return shown(content[:200].decode("utf-8", errors="replace").strip())
