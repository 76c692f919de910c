"""A scenario: everything that a simulation is asked for, as flags and scenario files say it."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, create_model

from kvsim.hardware.catalogue import load_gpu, load_host
from kvsim.models import load_model
from kvsim.scenario import kinds
from kvsim.scenario.engine_names import in_words
from kvsim.scenario.options import CLUSTER, GROUPS, GUESSING, MODEL, RESULTS, TRACE, Option, option, options_of
from kvsim.scenario.setup import Setup
from kvsim.scenario.speculation import speculation
from kvsim.text.documents import parse_yaml, read_document, validated
from policies import ModelShape, code_of, parse_policy
from policies.shown import shown

if TYPE_CHECKING:
    from traces import Trace

# The host that a GPU is commonly sold in, by the start of its catalogue name.
_HOSTS = {
    "rtx-": "desktop-i9-10900x",
    "gb200": "grace",
    "a100": "ddr4-dual-xeon",
    "a10g": "ddr4-dual-xeon",
    "t4": "ddr4-dual-xeon",
}
_OTHER_HOST = "ddr5-dual-xeon"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What `kvsim simulate` and `kvsim compare` are asked for.

    A scenario file has the keys of these options and of those that a `Setup` keeps, a flag the same with dashes.
    `setup` has the values of the latter by the names of their fields, and `given` the keys of all options that were
    said. `host` None is the one that the GPU is commonly sold in, and the dtypes None are the model's own. Build it
    with `scenario`, which says what is wrong in one line.
    """

    trace: str = option(
        MISSING,
        kinds.TEXT,
        TRACE,
        "A bundled trace, or a file, also a server's log.",
        metavar="TRACE",
        recorded="trace",
    )
    limit: int | None = option(None, kinds.NUMBER, TRACE, "Replay the first N requests only.", recorded="limit")
    rate_scale: float = option(
        1.0,
        kinds.Kind(Annotated[float, Field(ge=1e-6, le=1e6)], "X", flag=float),
        TRACE,
        "Let requests arrive X times as fast.",
        recorded="rate_scale",
    )
    seed: int = option(0, kinds.WHOLE.bounded(least=0), TRACE, "Of traces that are drawn at random.", recorded="seed")
    seeds: int = option(
        1,
        kinds.WHOLE.bounded(least=1, most=1000),
        TRACE,
        "So many from --seed on, or resample: adds 95 % intervals.",
        recorded="seeds",
    )
    skip_bad_rows: bool = option(
        False, kinds.SWITCH, TRACE, "Count malformed rows instead of refusing them.", recorded="skip_bad_rows"
    )
    model: str = option(
        MISSING,
        kinds.TEXT,
        MODEL,
        "A name of the catalogue, a config.json's path, or ORG/NAME of the local Hugging Face cache.",
        metavar="MODEL",
    )
    policy: tuple[str, ...] = option(
        ("full",), kinds.POLICIES, MODEL, "name or name:key=value,...; compare takes several."
    )
    kv_dtype: str | None = option(
        None, kinds.TEXT, MODEL, "Of cached keys and values. Default: the model's.", metavar="DTYPE"
    )
    weight_dtype: str | None = option(None, kinds.TEXT, MODEL, "Of all weights. Default: the model's.", metavar="DTYPE")
    params: int | None = option(
        None, kinds.WEIGHTS, MODEL, "State the weights, as 8B, of an architecture that the table of families lacks."
    )
    gpu: str = option(MISSING, kinds.TEXT, CLUSTER, "A GPU of the catalogue or a YAML file.", metavar="GPU")
    host: str | None = option(
        None, kinds.TEXT, CLUSTER, "A host of the catalogue or a YAML file. Default: by the GPU.", metavar="HOST"
    )
    speculate: int | None = option(
        None, kinds.WHOLE, GUESSING, "Guess K tokens ahead and verify them in one step. Default: none.", metavar="K"
    )
    acceptance: tuple[float, ...] = option(
        (), kinds.PROBABILITIES, GUESSING, "That a guess holds if those before it did."
    )
    tree: int | None = option(None, kinds.WHOLE, GUESSING, "Guesses verified at once. Default: K, a chain.")
    draft: str | None = option(None, kinds.TEXT, GUESSING, "Who guesses: a model, medusa, hidden-transfer or lookup.")
    draft_share: float | None = option(
        None, kinds.PART, GUESSING, "Or what a run of a draft takes of one of the model."
    )
    slo: dict[str, float] = option(
        dict, kinds.SLO, RESULTS, "Bounds that goodput counts: ttft=10s,tpot=100ms.", recorded="slo"
    )
    warmup: float = option(
        0.0, kinds.SECONDS, RESULTS, "Leave requests that arrive earlier out of the latencies.", recorded="warmup_s"
    )
    setup: dict[str, Any]
    given: frozenset[str]

    @property
    def slo_s(self) -> dict[str, float]:
        """The SLO's bounds by the names of latencies in results."""
        return self.slo

    def load_trace(self, further: int = 0) -> "Trace":
        """The trace's first `limit` requests, arriving `rate_scale` times as fast; raises TraceError as loaders do.

        `further` seeds after the first, where it is drawn at random.
        """
        import traces  # with it comes numpy, which a command's help does not need

        seed = self.seed + further
        trace = traces.load(self.trace, limit=self.limit, seed=seed, skip_bad_rows=self.skip_bad_rows)
        return trace if self.rate_scale == 1 else trace.scaled_rate(self.rate_scale)

    def load_traces(self) -> "list[Trace]":
        """The trace of each seed; a single one where the seed changes nothing, because the trace is recorded."""
        loaded = [self.load_trace(further) for further in range(min(2, self.seeds))]
        if len(loaded) > 1 and loaded[0].same_requests(loaded[1]):
            return loaded[:1]
        return loaded + [self.load_trace(further) for further in range(2, self.seeds)]

    def load_model(self) -> ModelShape:
        """The model, stored in the dtypes that were asked for; `weight_dtype` holds for all its weights."""
        return load_model(self.model, self.params).stored_as(self.weight_dtype, self.kv_dtype)

    def setups(self) -> list[Setup]:
        """What to simulate, for each policy in order.

        Raises ValueError for unknown names, for numbers out of range, and when the model does not fit on the GPUs.
        """
        gpu, model = load_gpu(self.gpu), self.load_model()
        host = load_host(self.host if self.host is not None else default_host(gpu.name))
        guessed = speculation(model, self.speculate, self.acceptance, self.tree, self.draft, self.draft_share)
        policies = [parse_policy(text) for text in self.policy]
        setups = [
            Setup(model=model, policy=policy, gpu=gpu, host=host, speculation=guessed, **self.setup)
            for policy in policies
        ]
        for setup in setups:
            setup.capacity()
        return setups

    def resolved(self) -> dict[str, Any]:
        """What `Setup` does not know of, for the `inputs` of a result."""
        return {one.recorded: getattr(self, one.name) for one in options_of(Scenario) if one.recorded}


OPTIONS = sorted([*options_of(Scenario), *options_of(Setup)], key=lambda one: GROUPS.index(one.group))
"""Every option of a simulation, one group after the other."""


def _field(one: Option) -> tuple[Any, Any]:
    """Type and default of an option's key, as pydantic takes them."""
    reads = one.kind.reads
    if one.least is not None:  # for the schema alone: a `Setup` says it in its own words
        reads = Annotated[reads, Field(json_schema_extra={"minimum": one.least})]
    default = ... if one.default is MISSING else one.default
    return reads if one.default is not None else reads | None, Field(default, description=one.help)


_KEYS: dict[str, Any] = {one.key: _field(one) for one in OPTIONS}
_DOCUMENT = create_model("Scenario", __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **_KEYS)
_SCHEMA = TypeAdapter(_DOCUMENT)


def schema() -> dict[str, Any]:
    """The JSON Schema of scenario files, for editors and other programs.

    It knows keys, types and names; what a command refuses beyond (units, figures that do not go together, what no
    catalogue has) it may accept. A file need not have all that is required: a command line may give it.
    """
    found = _standard(_DOCUMENT.model_json_schema())
    del found["required"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "kvsim scenario", **found}


_STANDARD = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum"}


def _standard(found: Any) -> Any:
    """A schema of pydantic's without titles made of keys, and with the standard's words for bounds beside text."""
    if isinstance(found, list):
        return [_standard(item) for item in found]
    if not isinstance(found, dict):
        return found
    named = {_STANDARD.get(key, key): value for key, value in found.items() if key not in ("title", "properties")}
    kept = {key: value if key in ("default", "enum") else _standard(value) for key, value in named.items()}
    if "properties" in found:
        kept["properties"] = {key: _standard(value) for key, value in found["properties"].items()}
    return kept


def load_scenario(options: Mapping[str, Any], file: Path | None = None, *, allow_code: bool = False) -> Scenario:
    """The scenario that `options` describe, on top of what the YAML `file` says.

    Raises ValueError that names every key that is unknown (with the nearest known one), missing, or has a bad value,
    and for policies of the file that are classes from outside, whose modules would be run, unless `allow_code`.
    """
    written = {} if file is None else parse_yaml(read_document(file), str(file))
    origin = " and ".join([*([str(file)] if file else []), *(["command line"] if options or not file else [])])
    for key in {**written, **options}:
        if key not in _KEYS and (words := in_words(str(key))):
            raise ValueError(f"{origin}: unknown key {shown(key)}; {words}")
    read = validated(_SCHEMA, {**written, **options}, [*_KEYS], origin)
    own, setup = ({one.name: getattr(read, one.key) for one in options_of(kept)} for kept in (Scenario, Setup))
    asked = Scenario(**own, setup=setup, given=frozenset(read.model_fields_set))
    code = [] if allow_code or "policy" in options else [name for text in asked.policy for name in code_of(text)]
    if code and file is not None:
        raise ValueError(
            f"{file}: policy={shown(code[0])} runs the code of that module, which a file may do only when the command "
            "line says so: add --allow-code if you trust the file, or name the policy with --policy"
        )
    return asked


def default_host(gpu: str) -> str:
    """The catalogue host that a GPU of this name is commonly sold in: for one that is not known, a DDR5 server."""
    return next((host for start, host in _HOSTS.items() if gpu.startswith(start)), _OTHER_HOST)
