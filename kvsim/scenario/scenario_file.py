"""A scenario: everything that a simulation is asked for, as flags and scenario files say it."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, TypeAdapter

import traces
from kvsim.hardware.catalogue import load_gpu, load_host
from kvsim.models import load_model
from kvsim.scenario.choices import LATENCIES
from kvsim.scenario.quotas import Quota, read_quota
from kvsim.scenario.setup import Setup
from kvsim.scenario.shares import measured_shares
from kvsim.scenario.speculation import parse_acceptance, speculation
from kvsim.scenario.tenants import Tenant, parse_tenant
from kvsim.text.documents import parse_yaml, read_document, validated
from kvsim.text.names import unknown_name
from kvsim.text.units import parse_bytes, parse_duration_s, parse_params, parse_tokens
from policies import ModelShape, code_of, parse_policy
from policies.shown import shown

T = TypeVar("T")

# The host that a GPU is commonly sold in, by the start of its catalogue name.
_HOSTS = {
    "rtx-": "desktop-i9-10900x",
    "gb200": "grace",
    "a100": "ddr4-dual-xeon",
    "a10g": "ddr4-dual-xeon",
    "t4": "ddr4-dual-xeon",
}
_OTHER_HOST = "ddr5-dual-xeon"
_BOUNDS = {name.removesuffix("_s"): name for name in LATENCIES}
_SETUP = {field.name: field for field in fields(Setup)}


def _default(name: str) -> Any:
    """A field with the default that `Setup` gives it, so that it is stated once."""
    field = _SETUP[name]
    if field.default_factory is not MISSING:
        return Field(default_factory=field.default_factory)
    return Field(default=field.default)


def _written(parse: Callable[[str], T]) -> BeforeValidator:
    """Takes text with a unit beside plain numbers."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _several(value: object) -> object:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{shown(text)} is not a number such as 0.4") from None


def _known_latencies(slo: dict[str, float]) -> dict[str, float]:
    for name in slo:
        if name not in _BOUNDS:
            raise unknown_name("latency", name, _BOUNDS)
    return slo


def _in_results(bounds: dict[str, float]) -> dict[str, float]:
    return {_BOUNDS[name]: bound_s for name, bound_s in _known_latencies(bounds).items()}


def _window(value: object) -> object:
    """Two times, as a list or as text with a dash between them."""
    parts = value.split("-") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise ValueError(f"{shown(value)} is not a window of two times such as 10s-12s")
    return tuple(parse_duration_s(part) if isinstance(part, str) else part for part in parts)


def _probabilities(value: object) -> object:
    """One, several as a list, or text with commas between them."""
    if isinstance(value, str):
        return parse_acceptance(value)
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int | float) else value


Number = Annotated[int, _written(parse_tokens), Field(ge=-(10**18), le=10**18)]  # what 64 bits count
Size = Annotated[int, _written(parse_bytes), Field(ge=0)]
Seconds = Annotated[float, _written(parse_duration_s), Field(ge=0)]
Bound = Annotated[float, _written(parse_duration_s), Field(gt=0)]
Terms = Annotated[Tenant, BeforeValidator(lambda value: parse_tenant(value) if isinstance(value, dict) else value)]
Class = Annotated[dict[str, Bound], Field(min_length=1), AfterValidator(_in_results)]
Share = Annotated[float, _written(_number), Field(ge=0, le=1)]


class Scenario(BaseModel):
    """The options of `kvsim simulate` and `kvsim compare`; a scenario file has these keys, a flag the same with dashes.

    Sizes, durations and numbers may be text with a unit, `counts` the file of a recorded run. `host` None is the one
    that the GPU is commonly sold in, and the dtypes None are the model's own. Build it with `scenario`, which says what
    is wrong in one line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    trace: str
    model: str
    gpu: str
    policy: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)] = ("full",)  # one or more
    limit: Number | None = None
    rate_scale: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    seed: Annotated[Number, Field(ge=0)] = 0
    seeds: Annotated[Number, Field(ge=1, le=1000)] = 1  # this one and those that follow it
    skip_bad_rows: bool = False
    gpus: Annotated[Number, Field(le=65_536)] = _default("gpus")  # more would outgrow this machine's memory
    tp: Number = _default("tp")
    pp: Number = _default("pp")
    prefill_gpus: Annotated[Number, Field(ge=0)] = _default("prefill_gpus")
    host: str | None = None
    fidelity: str = _default("fidelity")
    scheduler: str = _default("scheduler")
    router: str = _default("router")
    preemption: str = _default("preemption")
    sessions: str = _default("sessions")
    session_kv: str = _default("session_kv")
    max_num_seqs: Number = _default("max_num_seqs")
    max_num_batched_tokens: Number = _default("max_num_batched_tokens")
    gpu_memory_utilization: float = _default("gpu_memory_utilization")
    host_memory_utilization: float = _default("host_memory_utilization")
    prefix_cache_hbm: Size = _default("prefix_cache_hbm_bytes")
    prefix_cache_ddr: Size = _default("prefix_cache_ddr_bytes")
    prefix_cache_nvme: Size = _default("prefix_cache_nvme_bytes")
    prefix_cache_remote: Size = _default("prefix_cache_remote_bytes")
    prefix_cache_eviction: str = _default("prefix_cache_eviction")
    prefix_cache_write: str = _default("prefix_cache_write")
    prefix_cache_sharing: str = _default("prefix_cache_sharing")
    prefix_cache_reuse: str = _default("prefix_cache_reuse")
    prefix_cache_prefetch: bool = _default("prefix_cache_prefetch")
    prefix_cache_quota: Annotated[Quota, PlainValidator(read_quota)] = _default("prefix_cache_quota")
    timeout: Bound | None = _default("timeout_s")
    speculate: Number | None = None
    acceptance: Annotated[tuple[Share, ...], BeforeValidator(_probabilities)] = ()
    tree: Number | None = None
    draft: str | None = None
    draft_share: Share | None = None
    perfetto: Annotated[tuple[float, float], BeforeValidator(_window)] | None = _default("perfetto")
    kv_dtype: str | None = None
    weight_dtype: str | None = None
    params: Annotated[int, _written(parse_params)] | None = None
    counts: Annotated[dict[str, Share], _written(lambda text: measured_shares(Path(text)))] = _default("counts")
    tenants: dict[str, Terms] = _default("tenants")
    slo_classes: dict[str, Class] = _default("slo_classes")
    prompt_token_weight: float = _default("prompt_token_weight")
    output_token_weight: float = _default("output_token_weight")
    slo: Annotated[dict[str, Bound], AfterValidator(_known_latencies)] = Field(default_factory=dict)
    warmup: Seconds = 0.0

    @property
    def slo_s(self) -> dict[str, float]:
        """The SLO's bounds by the names of latencies in results."""
        return {_BOUNDS[name]: bound_s for name, bound_s in self.slo.items()}

    def load_trace(self, further: int = 0) -> traces.Trace:
        """The trace's first `limit` requests, arriving `rate_scale` times as fast; raises TraceError as loaders do.

        `further` seeds after the first, where it is drawn at random.
        """
        seed = self.seed + further
        trace = traces.load(self.trace, limit=self.limit, seed=seed, skip_bad_rows=self.skip_bad_rows)
        return trace if self.rate_scale == 1 else trace.scaled_rate(self.rate_scale)

    def load_traces(self) -> list[traces.Trace]:
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
        options = {
            name: getattr(self, name.removesuffix("_bytes").removesuffix("_s"))
            for name in _SETUP
            if name not in _LOADED
        }
        options["speculation"] = speculation(
            model, self.speculate, self.acceptance, self.tree, self.draft, self.draft_share
        )
        policies = [parse_policy(text) for text in self.policy]
        setups = [Setup(model=model, policy=policy, gpu=gpu, host=host, **options) for policy in policies]
        for setup in setups:
            setup.capacity()
        return setups

    def resolved(self) -> dict[str, Any]:
        """What `Setup` does not know of, for the `inputs` of a result."""
        return {
            "trace": self.trace,
            "limit": self.limit,
            "rate_scale": self.rate_scale,
            "seed": self.seed,
            "seeds": self.seeds,
            "skip_bad_rows": self.skip_bad_rows,
            "slo": self.slo_s,
            "warmup_s": self.warmup,
        }


_LOADED = ("model", "policy", "gpu", "host", "speculation")  # these are objects in a Setup, and names in a Scenario
_SCHEMA = TypeAdapter(Scenario)


def scenario(options: Mapping[str, Any], file: Path | None = None, *, allow_code: bool = False) -> Scenario:
    """The scenario that `options` describe, on top of what the YAML `file` says.

    Raises ValueError that names every key that is unknown (with the nearest known one), missing, or has a bad value,
    and for policies of the file that are classes from outside, whose modules would be run, unless `allow_code`.
    """
    written = {} if file is None else parse_yaml(read_document(file), str(file))
    origin = " and ".join([*([str(file)] if file else []), *(["command line"] if options or not file else [])])
    asked = validated(_SCHEMA, {**written, **options}, list(Scenario.model_fields), origin)
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
