"""What an option is, stated where its value is kept: flags, scenario files, their schema and the docs come from it."""

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from kvsim.scenario.kinds import Kind
from kvsim.text.names import unknown_name

TRACE, MODEL, CLUSTER, ENGINE, SESSIONS, CACHE, TENANTS, GUESSING, RESULTS = GROUPS = (
    "Trace",
    "Model and policy",
    "Cluster",
    "Engine",
    "Sessions",
    "Prefix cache",
    "Tenants",
    "Speculative decoding",
    "Results",
)
"""What options are about, in the order in which people are shown them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option as people give it: `key` in a scenario file, `flag` on a command line, one word for `default`.

    `name` is that of the field that keeps its value, whose unit a key leaves out; `recorded` the name in the `inputs`
    of a result. `least` is checked by whoever keeps the value, which also has no other than the kind's `choices`.
    """

    name: str
    key: str
    flag: str
    kind: Kind
    group: str
    help: str
    metavar: str
    default: Any  # MISSING: it must be given
    least: int | None
    recorded: str | None

    @property
    def default_words(self) -> str:
        """The default as help and docs say it; empty where the help says it itself, or nothing is meant by default."""
        if self.default is MISSING:
            return "required"
        unsaid = self.default is None or isinstance(self.default, bool | dict) or self.default == ()
        if unsaid or "Default:" in self.help:
            return ""
        return ",".join(self.default) if isinstance(self.default, tuple) else format(self.default)


def option(
    default: Any,
    kind: Kind,
    group: str,
    help: str,  # noqa: A002 - typer's word for it
    *,
    metavar: str | None = None,
    flag: str | None = None,
    least: int | None = None,
    recorded: str | None = None,
) -> Any:
    """A field of a dataclass that is an option; `default` MISSING: it must be given, a class: what that makes."""
    stated = {
        "kind": kind,
        "group": group,
        "help": help,
        "metavar": kind.metavar if metavar is None else metavar,
        "flag": flag,
        "least": least,
        "recorded": recorded,
    }
    if isinstance(default, type):
        return field(default_factory=default, metadata={"option": stated})
    return field(default=default, metadata={"option": stated})


def options_of(kept: type) -> tuple[Option, ...]:
    """The options that a dataclass keeps the values of, in its order."""
    return tuple(_option(one) for one in fields(kept) if "option" in one.metadata)


def check_options(keeper: object) -> None:
    """Raise ValueError for a value below its option's least, and for one that is none of its choices."""
    for one in options_of(type(keeper)):
        value = getattr(keeper, one.name)
        if one.least is not None and value is not None and value < one.least:
            raise ValueError(f"{one.name}={value} must be at least {one.least}")
        if one.kind.choices and value not in one.kind.choices:
            raise unknown_name(one.name, value, one.kind.choices)


def _option(kept: "Field[Any]") -> Option:
    stated = dict(kept.metadata["option"])
    key = kept.name.removesuffix("_bytes").removesuffix("_s")
    flag = stated.pop("flag") or key
    default = kept.default if kept.default_factory is MISSING else kept.default_factory()
    return Option(name=kept.name, key=key, flag=f"--{flag.replace('_', '-')}", default=default, **stated)
