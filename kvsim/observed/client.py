"""The load generator: requests of a trace to an OpenAI-compatible server, as they are due, and what came of each.

Nothing is sent but to the server that the user named: redirects are not followed, and no proxy, certificate, key or
password is taken from the environment or a file.
"""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx

from kvsim.observed.address import Address
from kvsim.observed.prompts import Prompts
from kvsim.observed.record import FINISHED, HTTP, INTERRUPTED, NONSENSE, TIMEOUT, UNREACHABLE, Record
from kvsim.observed.stream import Answer, NonsenseError
from policies.shown import shown
from traces import Trace

GIVE_UP = 50
"""Failures in a row after which no more requests are sent."""

_MOST_BODY_BYTES = 1 << 20
_SHOWN_BYTES = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a request may take: to connect, between two pieces of its answer, and in all; and how many at once."""

    connect_s: float
    stall_s: float
    request_s: float
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whom requests go to and how they are put; `key` is sent as a bearer's, `exact` asks to ignore ends of text."""

    server: Address
    model: str
    chat: bool
    exact: bool
    key: str = ""
    proxy: str | None = None

    def body(self, prompt: list[int] | str, output_tokens: int) -> bytes:
        """What is posted for one request."""
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        asked |= {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        if self.exact:
            asked |= {"min_tokens": output_tokens, "ignore_eos": True}
        return json.dumps(asked).encode()


class Load:
    """One run of the load generator; `kept` is called with each request's record as it ends."""

    def __init__(
        self, target: Target, trace: Trace, prompts: Prompts, patience: Patience, kept: Callable[[Record], None]
    ) -> None:
        self._target, self._trace, self._prompts, self._patience, self._kept = target, trace, prompts, patience, kept
        self._failures = 0
        self._begin_s = 0.0
        self.gave_up = False

    async def run(self, *, each_token: bool) -> None:
        """Send every request when it is due and wait for all answers; cancelled, what is under way is recorded."""
        due_s = (self._trace.arrival_s - self._trace.arrival_s[0]).tolist()
        free = asyncio.Semaphore(self._patience.in_flight)
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(_client(self._target, self._patience))
            group = await stack.enter_async_context(asyncio.TaskGroup())
            self._begin_s = time.perf_counter()
            for index, at_s in enumerate(due_s):
                body = await asyncio.to_thread(self._body, index)
                await free.acquire()
                await asyncio.sleep(max(0.0, self._begin_s + at_s - time.perf_counter()))
                if self._failures >= GIVE_UP:
                    self.gave_up = True
                    break
                group.create_task(self._one(client, free, index, at_s, body, each_token=each_token))

    def _body(self, index: int) -> bytes:
        return self._target.body(self._prompts[index], int(self._trace.output_tokens[index]))

    def _now_s(self) -> float:
        return time.perf_counter() - self._begin_s

    async def _one(
        self,
        client: httpx.AsyncClient,
        free: asyncio.Semaphore,
        index: int,
        due_s: float,
        body: bytes,
        *,
        each_token: bool,
    ) -> None:
        answer, sent_s, status, error = Answer(self._target.chat), self._now_s(), FINISHED, ""
        try:
            async with asyncio.timeout(self._patience.request_s):
                await self._ask(client, body, answer)
        except asyncio.CancelledError:
            status, error = INTERRUPTED, "the program was interrupted"
            raise
        except TimeoutError:
            status, error = TIMEOUT, f"no whole answer within {self._patience.request_s:g} s"
        except (_HttpError, NonsenseError, httpx.HTTPError, httpx.InvalidURL) as fault:
            status, error = _said(fault, self._patience)
        finally:
            free.release()
            self._failures = 0 if status == FINISHED else self._failures + 1
            self._kept(
                Record(
                    request=index,
                    status=status,
                    due_s=due_s,
                    sent_s=sent_s,
                    first_token_s=answer.token_s[0] if answer.token_s else None,
                    last_token_s=answer.token_s[-1] if answer.token_s else None,
                    end_s=self._now_s(),
                    asked_prompt_tokens=int(self._trace.prompt_tokens[index]),
                    asked_output_tokens=int(self._trace.output_tokens[index]),
                    prompt_tokens=answer.prompt_tokens,
                    output_tokens=answer.output_tokens,
                    cached_tokens=answer.cached_tokens,
                    error=error,
                    token_s=tuple(answer.token_s) if each_token else (),
                )
            )

    async def _ask(self, client: httpx.AsyncClient, body: bytes, answer: Answer) -> None:
        path = "chat/completions" if self._target.chat else "completions"
        async with client.stream("POST", self._target.server.of(path), content=body) as response:
            if response.status_code != httpx.codes.OK:
                raise _HttpError(await _failure(response))
            async for content in response.aiter_raw():
                answer.feed(content, self._now_s())
        answer.check_whole()


class _HttpError(Exception):
    """The server answered with another status than 200."""


def served_models(server: Address, key: str, proxy: str | None, patience: Patience) -> list[str] | None:
    """The models that a server says it serves; None where it has no such list (404).

    ValueError, in words, where it cannot be reached, hangs, refuses, or answers what no such server does.
    """
    target = Target(server=server, model="", chat=False, exact=False, key=key, proxy=proxy)
    url = server.of("models")
    try:
        return asyncio.run(_models(target, url, patience))
    except TimeoutError:
        raise ValueError(f"{url} gives no answer within {patience.stall_s:g} s; is the server up?") from None
    except (_HttpError, NonsenseError, httpx.HTTPError, httpx.InvalidURL) as fault:
        raise ValueError(f"{url}: {_said(fault, patience)[1]}") from None


async def _models(target: Target, url: str, patience: Patience) -> list[str] | None:
    async with (
        asyncio.timeout(patience.connect_s + patience.stall_s),
        _client(target, patience) as client,
        client.stream("GET", url) as response,
    ):
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        if response.status_code != httpx.codes.OK:
            raise _HttpError(await _failure(response))
        content = await _bounded(response, _MOST_BODY_BYTES)
    try:
        names = [model["id"] for model in json.loads(content)["data"]]
    except (ValueError, RecursionError, KeyError, TypeError):
        names = [None]
    if not all(isinstance(name, str) for name in names):
        start = content[:_SHOWN_BYTES].decode("utf-8", errors="replace")
        raise NonsenseError(f"{shown(start)} where a list of models was due; is it an OpenAI-compatible server?")
    return names


def _client(target: Target, patience: Patience) -> httpx.AsyncClient:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "kvsim"}
    if target.key:
        headers["Authorization"] = f"Bearer {target.key}"
    return httpx.AsyncClient(
        trust_env=False,
        follow_redirects=False,
        proxy=target.proxy,
        headers=headers,
        timeout=httpx.Timeout(patience.stall_s, connect=patience.connect_s, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=patience.in_flight),
    )


async def _bounded(response: httpx.Response, most_bytes: int) -> bytes:
    content = b""
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > most_bytes:
            break
    return content[:most_bytes]


async def _failure(response: httpx.Response) -> str:
    """What a server that answered with another status than 200 said."""
    status = f"HTTP {response.status_code}"
    if response.is_redirect or response.has_redirect_location:
        where = response.headers.get("location", "")
        return f"{status}, which leads to {shown(where)}: not followed; name that server if you mean it"
    if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return f"{status}: the server wants a key; name the environment's variable that holds it with --api-key-env"
    said = (await _bounded(response, _SHOWN_BYTES)).decode("utf-8", errors="replace")
    return f"{status}: {shown(said)}" if said.strip() else status


def _said(fault: Exception, patience: Patience) -> tuple[str, str]:
    """Status and words of what went wrong with a request."""
    match fault:
        case _HttpError():
            return HTTP, str(fault)
        case NonsenseError():
            return NONSENSE, f"the server answered {fault}"
        case httpx.ConnectTimeout():
            return TIMEOUT, f"no connection within {patience.connect_s:g} s; is the address right?"
        case httpx.TimeoutException():
            return TIMEOUT, f"nothing came for {patience.stall_s:g} s"
        case httpx.ConnectError():
            return UNREACHABLE, f"no connection ({fault or 'refused'}); is the server up, and the address right?"
        case httpx.RemoteProtocolError():
            return NONSENSE, f"the server broke off, or speaks no HTTP ({shown(str(fault))})"
    return UNREACHABLE, f"the connection failed ({type(fault).__name__})"
