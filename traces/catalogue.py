"""The bundled traces by name, and `load`: a bundled name or a path, with options, to a Trace."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from traces import sglang_log, vllm_log
from traces.archive import members
from traces.formats import load_table, read_options
from traces.log_text import is_log, log_lines
from traces.options import unknown
from traces.schema import Trace, TraceError
from traces.synthetic import described
from traces.table import READ_ONLY, SUFFIXES, read_table

SYNTHETIC = "synthetic"
ARCHIVES = (".tar", ".tar.gz", ".tar.xz")
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundled:
    """A trace that comes with the package; `file` is below `traces/data`, beside its LICENSE."""

    name: str
    description: str
    licence: str
    attribution: str
    file: str


_MOONCAKE = "Qin et al., Mooncake, FAST 2025; kvcache-ai/Mooncake"
_AZURE = "Azure public dataset, Azure LLM inference trace 2023; Patel et al., Splitwise, ISCA 2024"

BUNDLED = (
    Bundled(
        name="mooncake-conversation",
        description="12,031 requests of one hour of online chat, prefix hashes per 512-token block [spread_s]",
        licence="Apache-2.0",
        attribution=_MOONCAKE,
        file="mooncake/conversation_trace.jsonl.gz",
    ),
    Bundled(
        name="mooncake-synthetic",
        description="3,993 long-context requests from public data sets, Poisson arrivals, prefix hashes [spread_s]",
        licence="Apache-2.0",
        attribution=_MOONCAKE,
        file="mooncake/synthetic_trace.jsonl.gz",
    ),
    Bundled(
        name="azure-2023-code",
        description="8,819 requests of about an hour of a production code-completion service, no prefix data",
        licence="CC-BY-4.0",
        attribution=_AZURE,
        file="azure-2023/AzureLLMInferenceTrace_code.csv.gz",
    ),
    Bundled(
        name="azure-2023-conv",
        description="19,366 requests of about an hour of a production chat service, no prefix data",
        licence="CC-BY-4.0",
        attribution=_AZURE,
        file="azure-2023/AzureLLMInferenceTrace_conv.csv.gz",
    ),
    Bundled(
        name="agentic-coding",
        description="49,307 requests of 710 coding-agent sessions, hashes per 64 tokens [start, session_rate_per_s]",
        licence="Apache-2.0",
        attribution="callanjfox/kv-cache-tester",
        file="agentic-coding/sessions.npz",
    ),
    Bundled(
        name="servegen-deepseek-r1",
        description="one day of a reasoning service, 73 clients as fitted models to sample [start_s, span_s, clients]",
        licence="Apache-2.0",
        attribution="Xiang et al., ServeGen, 2025 (arXiv 2505.09999); alibaba/ServeGen",
        file="servegen/deepseek-r1.tar.xz",
    ),
)


def names() -> list[Bundled]:
    """The bundled traces, each with a one-line description (its options in brackets), licence and attribution."""
    return list(BUNDLED)


def load(
    text: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    skip_bad_rows: bool = False,
    time_unit: str | None = None,
    block_tokens: int | None = None,
) -> Trace:
    """The trace that the text names: a bundled name or a path, either followed by `:key=value,key=value` options.

    `synthetic:rate=2,prompt=fixed:1000` is a workload in words (`traces.synthetic.described`), drawn by `seed`.
    A path's format is told from its columns or keys (`traces.formats`), from the members of an archive (ServeGen,
    agentic) or from the lines of a log (vLLM, SGLang). `limit` keeps the first requests by arrival; `seed` drives what
    is sampled. `time_unit` ("s", "ms", "us", "ns") and `block_tokens` are the options of these names. Raises TraceError
    for an unknown name or option, for a unit or block that is not certain, and for a malformed file, whose bad rows
    `skip_bad_rows` counts instead.
    """
    if limit is not None and limit < 1:
        raise TraceError(f"limit={limit}: must be at least 1 request, or None for all")
    head, colon, words = text.partition(":")
    if head == SYNTHETIC and not Path(text).exists():
        if time_unit is not None or block_tokens is not None or skip_bad_rows:
            raise TraceError(f"{SYNTHETIC}: nothing is read from a file; state rate, prompt, block_tokens... behind it")
        return described(words if colon else "", seed=seed, limit=limit)
    path, name, options = _resolve(text)
    stated = {"time_unit": time_unit, "block_tokens": block_tokens}
    options = ",".join(
        filter(None, (options, *(f"{key}={value}" for key, value in stated.items() if value is not None)))
    )
    if path.suffix == ".npz":
        from traces import agentic

        sessions = agentic.Sessions.read(path)
        return agentic.to_trace(sessions, read_options(agentic.Options, options), name=name, seed=seed, limit=limit)
    if path.name.endswith(ARCHIVES):
        if skip_bad_rows:
            raise TraceError(
                f"{path}: skip_bad_rows is for tables of requests; archives are read whole or not at all; leave it out"
            )
        return _load_archive(path, name, options, seed=seed, limit=limit)
    read = _load_log if is_log(path) else _load_table
    trace = read(path, name, options, seed=seed, skip_bad_rows=skip_bad_rows)
    return trace if limit is None else trace.head(limit)


def _resolve(text: str) -> tuple[Path, str, str]:
    """(file, name of the trace, options text)."""
    head, _, options = (text, "", "") if Path(text).exists() else text.partition(":")
    files = {bundled.name: DATA / bundled.file for bundled in BUNDLED}
    if head in files:
        return files[head], head, options
    path = Path(head)
    if not path.exists():
        if path.parent != Path() or path.name.endswith((*SUFFIXES, *READ_ONLY, *ARCHIVES, ".npz", ".log")):
            raise TraceError(f"{head}: no such file; give a path, or one of {', '.join(files)}")
        raise unknown("trace", head, files)
    return path, path.name, options


def _load_archive(path: Path, name: str, options: str, *, seed: int, limit: int | None) -> Trace:
    from traces import agentic, servegen

    first, _ = next(members(path), ("", ""))
    if servegen.MEMBER.search(first):
        chosen = read_options(servegen.Options, options)
        return servegen.to_trace(servegen.read_clients(path), chosen, name=name, seed=seed, limit=limit)
    if not first.endswith(".json"):
        raise TraceError(f"{path}/{first}: unknown archive; must hold ServeGen chunks or agentic sessions (.json)")
    given = read_options(agentic.Options, options)
    return agentic.to_trace(agentic.read_archive(path), given, name=name, seed=seed, limit=limit)


def _load_table(path: Path, name: str, options: str, *, seed: int, skip_bad_rows: bool) -> Trace:
    table = read_table(path, skip_bad_rows=skip_bad_rows)
    return load_table(table, options, name=name, seed=seed, skip_bad_rows=skip_bad_rows)


def _load_log(path: Path, name: str, options: str, *, seed: int, skip_bad_rows: bool) -> Trace:
    for _, line in log_lines(path):
        if vllm_log.is_request(line):
            read = partial(vllm_log.load, log_lines(path), read_options(vllm_log.Options, options))
            break
        if sglang_log.is_request(line):
            read = partial(sglang_log.load, log_lines(path), read_options(sglang_log.Options, options))
            break
    else:
        raise TraceError(
            f"{path}: no requests in the log; run vLLM with --enable-log-requests, SGLang with --log-requests"
        )
    return read(source=str(path), name=name, seed=seed, skip_bad_rows=skip_bad_rows)
