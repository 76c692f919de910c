"""What the dimensions of a sweep are on a page: axes of figures where their values are amounts, colours, labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvsim.report.plots import COLOURS, Style, style
from kvsim.report.points import Axis, seconds
from kvsim.results.row import Value
from kvsim.scenario.scenario_file import OPTIONS
from kvsim.text.units import format_bytes, parse_bytes, parse_duration_s

MOST_COLOURS = 8  # that are told apart; a dimension of more amounts has quarters instead
_DASHES = 3  # lines of one colour that are told apart
_UNITS: Mapping[str, Callable[[str], float]] = {"_bytes": parse_bytes, "_s": parse_duration_s}
_NAMES = {one.key: one.name for one in OPTIONS}


class Group(NamedTuple):
    """Points that share a label and a look: the numbers of their rows."""

    label: str
    style: Style
    rows: list[int]


class Groups(NamedTuple):
    """All points by group; `joined`, where those of a group follow each other."""

    groups: list[Group]
    joined: bool


def amounts(key: str, values: Sequence[Value]) -> list[float] | None:
    """The values of a dimension as amounts in bytes, seconds or plain numbers; None where one of them is none."""
    parse = next((own for unit, own in _UNITS.items() if _NAMES.get(key, "").endswith(unit)), None)
    found = []
    for value in values:
        if isinstance(value, bool) or value is None or (isinstance(value, str) and parse is None):
            return None
        try:
            found.append(float(parse(str(value)) if parse is not None else value))
        except ValueError:  # as `none` for no limit
            return None
    return found


def axis_of(key: str, values: Sequence[float]) -> Axis:
    """The axis of a dimension's amounts."""
    name = _NAMES.get(key, key)
    if name.endswith("_bytes"):
        power = max((power for power in range(6) if max(values) >= 1024**power), default=0)
        return Axis(f"{key} ({format_bytes(1024**power).split()[1]})", float(1024**power))
    return seconds(key, values) if name.endswith("_s") else Axis(key)


def words_of(row: Mapping[str, Value], keys: Sequence[str]) -> str:
    """What a point has of some dimensions."""
    return ", ".join(f"{key} {row[key]}" for key in keys)


def first_of_amounts(rows: Sequence[Mapping[str, Value]], dims: Sequence[str]) -> str:
    """The dimension to draw along: the first that has several amounts, else the first that has several values."""
    several = [key for key in dims if len({row[key] for row in rows}) > 1] or list(dims)
    return next((key for key in several if amounts(key, [row[key] for row in rows]) is not None), several[0])


def grouped(rows: Sequence[Mapping[str, Value]], along: str, dims: Sequence[str]) -> Groups:
    """Points that differ in `along` alone as a line each, coloured by the next dimension; as loose points if too many.

    Points of many amounts at random are coloured by the quarters of these.
    """
    others = [key for key in dims if key != along and len({row[key] for row in rows}) > 1]
    if not others:
        return Groups([Group("all points", style(0), list(range(len(rows))))], joined=True)
    colour = next((key for key in others if len({row[key] for row in rows}) <= MOST_COLOURS), others[0])
    found = amounts(colour, [row[colour] for row in rows])
    names = _names([row[colour] for row in rows], found)
    rising = sorted(range(len(rows)), key=found.__getitem__) if found is not None else range(len(rows))
    colours = {name: index for index, name in enumerate(dict.fromkeys(names[i] for i in rising))}
    rest = [key for key in others if key != colour]
    lines: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        lines.setdefault((names[i], words_of(row, rest)), []).append(i)
    dashes = list(dict.fromkeys(words for _, words in lines))
    single = all(len({rows[i][along] for i in own}) == len(own) for own in lines.values())
    if single and len(dashes) <= _DASHES and len({row[colour] for row in rows}) == len(colours):
        groups = []
        for (name, words), own in lines.items():
            label = f"{colour} {name}" + (f", {words}" if words else "")
            groups.append(Group(label, style(colours[name] + len(COLOURS) * dashes.index(words)), own))
        return Groups(groups, joined=True)
    loose = {
        name: [i for i in range(len(rows)) if names[i] == name] for name in sorted(colours, key=colours.__getitem__)
    }
    return Groups([Group(f"{colour} {name}", style(colours[name]), own) for name, own in loose.items()], joined=False)


def _names(values: Sequence[Value], found: Sequence[float] | None) -> list[str]:
    """What each value is called in a legend: itself, or the quarter of all amounts that it lies in."""
    if len(set(values)) <= MOST_COLOURS:
        return [str(value) for value in values]
    if found is None:
        return ["any"] * len(values)
    ordered = sorted(found)
    ends = [ordered[(len(ordered) - 1) * quarter // 4] for quarter in range(5)]
    quarters = [next(i for i in range(1, 5) if amount <= ends[i]) for amount in found]
    return [f"{ends[i - 1]:.4g} to {ends[i]:.4g}" for i in quarters]
