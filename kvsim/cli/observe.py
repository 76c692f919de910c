"""`kvsim observe`: send a trace's requests to a running server and record what its clients see."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvsim.cli.extras import require_client
from kvsim.cli.options import given_options, with_options
from kvsim.cli.output import JsonFlag, print_facts, print_json, print_line
from kvsim.cli.progress import progress_bar
from kvsim.scenario.scenario_file import OPTIONS
from kvsim.text.units import parse_duration_s
from policies.shown import shown

if TYPE_CHECKING:
    from typing import TextIO

    from kvsim.observed.client import Patience, Target
    from kvsim.observed.record import Record
    from traces import Trace

INTERRUPTED = 130
_OPTIONS = [one for one in OPTIONS if one.key in ("trace", "limit", "rate_scale", "seed", "skip_bad_rows")]


def observe(
    ctx: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="The server, as http://localhost:8000 or with its path.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines, a request each; none that exists is touched.")],
    rate: Annotated[
        float | None, typer.Option(metavar="R", help="Scale arrivals to R requests/s. Default: as recorded.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="As the server calls it. Default: the only one that it serves.")
    ] = None,
    endpoint: Annotated[
        Literal["completions", "chat"], typer.Option(help="completions sends ids of tokens, chat words.")
    ] = "completions",
    text: Annotated[
        bool, typer.Option("--text", help="Send words to completions too; lengths are about those of the trace then.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact/--no-exact", help="Ask for all output tokens (ignore_eos), as vLLM and SGLang can.")
    ] = True,
    token_times: Annotated[
        bool, typer.Option("--token-times", help="Record when each token came, not only the first and the last.")
    ] = False,
    connect_timeout: Annotated[
        float, typer.Option(metavar="TIME", parser=parse_duration_s, help="Until a connection stands.")
    ] = "10s",  # type: ignore[assignment]
    stall_timeout: Annotated[
        float, typer.Option(metavar="TIME", parser=parse_duration_s, help="Without a byte of an answer.")
    ] = "2m",  # type: ignore[assignment]
    request_timeout: Annotated[
        float, typer.Option(metavar="TIME", parser=parse_duration_s, help="Of a whole answer.")
    ] = "10m",  # type: ignore[assignment]
    max_in_flight: Annotated[int, typer.Option(min=1, max=20_000, metavar="N", help="Later ones wait.")] = 512,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment's variable that holds a key. Default: no key.")
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Go through this one. Default: none, whatever the environment says."),
    ] = None,
    json: JsonFlag = False,
    **_options: object,  # those of the trace, which are read from the context
) -> None:
    """Replay a trace's arrivals and lengths against an OpenAI-compatible server.

    Nothing is sent but to URL: redirects are not followed, and no proxy or key is used that is not asked for. Prompts
    are made up: requests whose prompts begin alike in the trace do so here. Records are kept as requests end, also
    after Ctrl-C.
    """
    require_client()
    from kvsim.observed.address import address
    from kvsim.observed.client import Patience, Target, served_models

    server = address(url)
    if out.suffix != ".jsonl":
        raise ValueError(f"--out {shown(str(out))} must end in .jsonl, by which such records are known")
    for name, value_s in (("connect", connect_timeout), ("stall", stall_timeout), ("request", request_timeout)):
        if value_s <= 0:
            raise ValueError(f"--{name}-timeout {value_s:g} must be above 0")
    if proxy is not None:
        _check_proxy(proxy)
    trace = _trace(given_options(ctx, _OPTIONS), rate)
    patience = Patience(
        connect_s=connect_timeout, stall_s=stall_timeout, request_s=request_timeout, in_flight=max_in_flight
    )
    key = _key(api_key_env)
    target = Target(
        server=server,
        model=_model(served_models(server, key, proxy, patience), model, server.base),
        chat=endpoint == "chat",
        exact=exact,
        key=key,
        proxy=proxy,
    )
    with ExitStack() as stack:
        stream = stack.enter_context(_new(out))
        records, ended = _observed(target, trace, patience, stream, text=text, each_token=token_times)
    _report(records, len(trace), out, ended, json=json)


observe = with_options(observe, _OPTIONS)


def _trace(options: dict[str, object], rate: float | None) -> "Trace":
    """The trace, arriving as it was asked for."""
    import traces

    if "trace" not in options:
        raise ValueError("--trace says which arrivals and lengths to send; or describe them: --trace synthetic:rate=2")
    seed, limit = options.get("seed", 0), options.get("limit")
    if limit is not None:
        from kvsim.text.units import parse_tokens

        limit = parse_tokens(str(limit))
    scale = float(str(options.get("rate_scale", 1)))
    if rate is not None and "rate_scale" in options:
        raise ValueError("--rate and --rate-scale both say how fast requests arrive; give one of them")
    trace = traces.load(
        str(options["trace"]),
        limit=limit,
        seed=int(str(seed)),
        skip_bad_rows=bool(options.get("skip_bad_rows", False)),
    )
    if rate is not None:
        span_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
        if not 1e-6 <= rate <= 1e6:
            raise ValueError(f"--rate {rate:g} must be from 1e-06 to 1e+06 requests/s")
        if span_s <= 0:
            raise ValueError(f"--rate {rate:g}: all requests of {shown(trace.name)} arrive at once; leave it out")
        scale = rate * span_s / (len(trace) - 1)
    return trace if scale == 1 else trace.scaled_rate(scale)


def _key(name: str | None) -> str:
    if name is None:
        return ""
    key = os.environ.get(name, "")
    if not key.strip() or not key.isascii() or not key.isprintable():
        raise ValueError(
            f"--api-key-env {shown(name)}: the environment has no key under that name; set it, or leave it out"
        )
    return key.strip()


def _check_proxy(proxy: str) -> None:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(proxy)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or True)
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"--proxy {shown(proxy)} is no URL of http or https, such as http://proxy:3128")


def _model(served: list[str] | None, asked: str | None, base: str) -> str:
    """The model to ask for; ValueError where the server serves another, several, or does not say."""
    if asked is None:
        if served is None or len(served) != 1:
            has = (
                "does not say what it serves"
                if not served
                else f"serves {len(served)} models, {shown(served[0])} first"
            )
            raise ValueError(f"{base} {has}; choose one with --model")
        return served[0]
    if served and asked not in served:
        from kvsim.text.names import unknown_name

        raise unknown_name("model of this server", asked, served)
    return asked


def _new(out: Path) -> "TextIO":
    try:
        return out.open("x", encoding="utf-8")
    except FileExistsError:
        raise ValueError(f"--out {out} exists, and is left as it is; name another file") from None
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}; name a file in a folder that takes one") from None


def _observed(
    target: "Target", trace: "Trace", patience: "Patience", stream: "TextIO", *, text: bool, each_token: bool
) -> "tuple[list[Record], str]":
    """The records of a run, and why it ended early: `interrupted`, `gave up`, or nothing."""
    import asyncio
    import datetime as dt

    from kvsim.observed.client import Load
    from kvsim.observed.prompts import Prompts
    from kvsim.observed.record import RecordFile
    from kvsim.version import __version__

    form = "text" if text or target.chat else "tokens"
    about = {
        "kvsim": __version__,
        "url": target.server.base,
        "model": target.model,
        "endpoint": "chat" if target.chat else "completions",
        "prompts": form,
        "trace": trace.name,
        "requests": len(trace),
        "began": dt.datetime.now(tz=dt.UTC).isoformat(timespec="milliseconds"),
    }
    records: list[Record] = []
    file = RecordFile(stream, about)
    with progress_bar("observe", len(trace)) as show:

        def keep(record: "Record") -> None:
            records.append(record)
            file.keep(record)
            show(len(records))

        load = Load(target, trace, Prompts(trace, form, seed=0), patience, keep)
        try:
            asyncio.run(load.run(each_token=each_token))
        except KeyboardInterrupt:
            return records, "interrupted"
        except BaseExceptionGroup as several:
            lost = _first(several)
            if not isinstance(lost, OSError):
                raise
            # The file's: what goes wrong with a request is in its record.
            raise ValueError(f"{stream.name}: {lost.strerror}; it has the requests that ended before") from None
    return records, "gave up" if load.gave_up else ""


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _report(records: "list[Record]", asked: int, out: Path, ended: str, *, json: bool) -> None:
    """Print what was seen, and end as that asks for: 2 where no request finished, 130 after Ctrl-C."""
    from kvsim.observed.client import GIVE_UP
    from kvsim.observed.seen import seen_of

    seen = seen_of(records, asked)
    if json:
        print_json({"file": str(out), "ended": ended or "whole", **seen.document})
    else:
        print_facts(f"{seen.finished:,} of {asked:,} requests finished, in {out}", seen.facts)
    for words in seen.warnings:
        print_line(f"warning: {words}", err=True)
    if ended == "interrupted":
        print_line(f"interrupted: {out} has the {len(records):,} requests that were sent", err=True)
        raise typer.Exit(INTERRUPTED)
    if not seen.finished:
        raise ValueError(f"no request finished; most often: {seen.commonest}. {out} has all of them")
    if ended:
        print_line(f"gave up after {GIVE_UP} failures in a row: the results are partial", err=True)
        raise typer.Exit(2)
