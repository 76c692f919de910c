"""The PCIe switches of a host as a user's file draws them: a tree under the root complex, with GPUs at its leaves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter

from kvsim.text.documents import validated
from kvsim.text.names import unknown_name
from policies.shown import shown

ROOT = "root"


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """What is above a switch, `root` or another one, the GPUs on it, and its rate upwards, each way."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    under: str
    Bps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    gpus: tuple[Annotated[int, Field(ge=0)], ...] = ()


_SCHEMA = TypeAdapter(dict[str, Switch])
_KNOWN = ["under", "Bps", "gpus"]


def switch_figures(document: Mapping[str, Any], gpus_max: int, origin: str) -> dict[str, Any]:
    """`gpus_per_switch` and `switch_Bps` of a host whose switches are drawn.

    Switches with GPUs must be alike, and those above them as wide as all that is below, so that these alone hold up a
    transfer. Raises ValueError for a ring, for what does not lead to the root, for GPUs on no switch or on two, and for
    a tree that is not of this form.
    """
    switches = validated(_SCHEMA, document, _KNOWN, f"{origin}: switches")
    try:
        _check_tree(switches)
        leaves = _leaves(switches, gpus_max)
    except ValueError as error:
        raise ValueError(f"{origin}: switches: {error}") from None
    first = leaves[0]
    return {"gpus_per_switch": len(first.gpus), "switch_Bps": first.Bps}


def _check_tree(switches: Mapping[str, Switch]) -> None:
    import networkx as nx

    if ROOT in switches:
        raise ValueError(f"{shown(ROOT)} is the root complex, above all switches; name this one differently")
    for name, switch in switches.items():
        if switch.under not in (ROOT, *switches):
            raise unknown_name(f"switch above {shown(name)},", switch.under, (ROOT, *switches))
    graph = nx.DiGraph([(name, switch.under) for name, switch in switches.items()])
    if not nx.is_directed_acyclic_graph(graph):
        ring = [edge[0] for edge in nx.find_cycle(graph)]
        raise ValueError(f"{' -> '.join([*ring, ring[0]])} is a ring without a way to the root; put one under {ROOT}")
    for name, switch in switches.items():
        below = [other for other in switches.values() if other.under == name]
        if bool(below) == bool(switch.gpus):
            what = "has GPUs beside switches below it" if below else "has neither GPUs nor switches below it"
            raise ValueError(f"{name} {what}; it needs one or the other")
        brought_Bps = sum(other.Bps for other in below)
        if brought_Bps > switch.Bps:
            raise ValueError(
                f"{name}: Bps={switch.Bps:g} is below the {brought_Bps:g} of the switches under it; only the lowest "
                "switches may hold up a transfer, so widen it or draw what hangs on it as one switch"
            )


def _leaves(switches: Mapping[str, Switch], gpus_max: int) -> list[Switch]:
    """The switches with GPUs, in the order of these."""
    leaves = sorted((one for one in switches.values() if one.gpus), key=lambda one: one.gpus)
    gpus = [gpu for leaf in leaves for gpu in leaf.gpus]
    twice = sorted({gpu for gpu in gpus if gpus.count(gpu) > 1})
    if twice:
        raise ValueError(f"GPU {twice[0]} hangs on two switches; leave it on one")
    missing, beyond = sorted(set(range(gpus_max)) - set(gpus)), sorted(set(gpus) - set(range(gpus_max)))
    if missing:
        raise ValueError(f"GPU {missing[0]} hangs on no switch, and gpus_max={gpus_max} counts it; put it on one")
    if beyond:
        raise ValueError(f"GPU {beyond[0]} does not exist: gpus_max={gpus_max} numbers them from 0 to {gpus_max - 1}")
    per_switch = len(leaves[0].gpus)
    for number, leaf in enumerate(leaves):
        first = number * per_switch
        alike = leaf.gpus == tuple(range(first, min(first + per_switch, gpus_max))) and leaf.Bps == leaves[0].Bps
        if not alike:
            raise ValueError(
                f"the switch with GPUs {list(leaf.gpus)} differs from that with {list(leaves[0].gpus)}; all must have "
                "equally many GPUs, in order, and the same Bps"
            )
    return leaves
