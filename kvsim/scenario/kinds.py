"""How the values of options are written: in scenario files as numbers or as text with a unit, in flags as text."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema

from kvsim.scenario.choices import LATENCIES
from kvsim.scenario.quotas import Quota, read_quota
from kvsim.scenario.shares import measured_shares, parse_shares
from kvsim.scenario.speculation import parse_acceptance
from kvsim.scenario.tenants import TERMS, Tenant, parse_named, parse_tenant
from kvsim.text.names import unknown_name
from kvsim.text.units import parse_bytes, parse_duration_s, parse_params, parse_tokens
from policies.shown import shown

T = TypeVar("T")


class Kind(NamedTuple):
    """How the values of an option are written.

    `reads` is what a scenario file holds, as a type of pydantic's, and `flag` what typer makes of a flag's text first.
    A flag that `gathers` may be repeated: its texts become one value, as a file would hold it.
    """

    reads: Any
    metavar: str
    flag: type = str
    gathers: Callable[[list[str]], Any] | None = None
    choices: tuple[str, ...] = ()

    def bounded(self, least: int | None = None, most: int | None = None) -> "Kind":
        """The same within bounds, which are themselves allowed."""
        return self._replace(reads=Annotated[self.reads, Field(ge=least, le=most)])


def choice(names: tuple[str, ...], metavar: str | None = None) -> Kind:
    """One of some names."""
    reads = Annotated[str, Field(json_schema_extra={"enum": list(names)})]
    return Kind(reads, "|".join(names) if metavar is None else metavar, choices=names)


def _written(parse: Callable[[str], T], plain: Any) -> BeforeValidator:
    """Takes text with a unit beside what is `plain` already."""
    return BeforeValidator(
        lambda value: parse(value) if isinstance(value, str) else value, json_schema_input_type=plain | str
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{shown(text)} is not a number such as 0.4") from None


def _several(value: object) -> object:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


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


_BOUNDS = {name.removesuffix("_s"): name for name in LATENCIES}


def _in_results(bounds: dict[str, float]) -> dict[str, float]:
    """Bounds by the names that latencies have in results."""
    for name in bounds:
        if name not in _BOUNDS:
            raise unknown_name("latency", name, _BOUNDS)
    return {_BOUNDS[name]: bound_s for name, bound_s in bounds.items()}


def _bounds(texts: list[str]) -> dict[str, str]:
    bounds: dict[str, str] = {}
    for item in ",".join(texts).split(","):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--slo {shown(item)} must be written name=value")
        if name in bounds:
            raise ValueError(f"--slo gives {shown(name)} twice; say it once")
        bounds[name] = value
    return bounds


_Number = Annotated[int, _written(parse_tokens, int), Field(ge=-(10**18), le=10**18)]  # what 64 bits count
_Bound = Annotated[float, _written(parse_duration_s, float), Field(gt=0)]
_Share = Annotated[float, _written(_number, float), Field(ge=0, le=1)]
_Window = Annotated[tuple[float, float], BeforeValidator(_window, json_schema_input_type=list[float | str] | str)]
_Latencies = Field(json_schema_extra={"propertyNames": {"enum": list(_BOUNDS)}})
_Terms = Annotated[
    Tenant,
    BeforeValidator(lambda value: parse_tenant(value) if isinstance(value, dict) else value),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: {"type": "string" if name == "slo_class" else ["number", "string"]} for name in TERMS},
        }
    ),
]
_Class = Annotated[dict[str, _Bound], Field(min_length=1), _Latencies, AfterValidator(_in_results)]

TEXT = Kind(str, "NAME")
SWITCH = Kind(bool, "", flag=bool)
WHOLE = Kind(_Number, "N", flag=int)  # as a flag, without a unit
NUMBER = Kind(_Number, "N")
FACTOR = Kind(float, "X", flag=float)
SHARE = Kind(float, "SHARE", flag=float)
SIZE = Kind(Annotated[int, _written(parse_bytes, int), Field(ge=0)], "SIZE")
SECONDS = Kind(Annotated[float, _written(parse_duration_s, float), Field(ge=0)], "TIME")
TIMEOUT = Kind(_Bound, "TIME")
WINDOW = Kind(_Window, "FROM-TO")
WEIGHTS = Kind(Annotated[int, _written(parse_params, int)], "N")
POLICIES = Kind(
    Annotated[
        tuple[str, ...],
        BeforeValidator(_several, json_schema_input_type=Annotated[list[str], Field(min_length=1)] | str),
        Field(min_length=1),
    ],
    "POLICY",
    gathers=list,
)
PROBABILITIES = Kind(
    Annotated[
        tuple[_Share, ...],
        BeforeValidator(_probabilities, json_schema_input_type=list[float | str] | float | str),
    ],
    "P|P,P,...",
)
PART = Kind(_Share, "SHARE", flag=float)
QUOTA = Kind(
    Annotated[Quota, PlainValidator(read_quota, json_schema_input_type=dict[str, float | str] | float | str)],
    "SHARE|NAME=SHARE,...",
)
COUNTS = Kind(
    Annotated[dict[str, _Share], _written(lambda text: measured_shares(Path(text)), dict[str, float | str])],
    "NAME=SHARE,...|FILE",
    gathers=parse_shares,
)
SLO = Kind(Annotated[dict[str, _Bound], _Latencies, AfterValidator(_in_results)], "NAME=TIME,...", gathers=_bounds)
TENANTS = Kind(dict[str, _Terms], "NAME:KEY=VALUE,...", gathers=lambda texts: parse_named("--tenant", texts))
CLASSES = Kind(dict[str, _Class], "NAME:LATENCY=TIME,...", gathers=lambda texts: parse_named("--slo-class", texts))
