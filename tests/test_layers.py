"""The rooms of kvsim stand one above the other: imports go down, never up, and modules import nothing in a circle."""

import ast
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kvsim"
ROOMS = (  # from the ground up: each imports from those before it alone
    "version",
    "text",
    "hardware",
    "models",
    "scenario",
    "plans",
    "iteration",
    "explain",
    "engine",
    "results",
    "run",
    "observed",
    "planning",
    "report",
    "notebook",
    "cli",
    "__main__",
)
FACE = "kvsim"  # the package itself: names for those outside, which nobody inside imports
ONLY_BY = {  # who may import a room, where that is fewer than all above it
    "results": {"run", "observed", "planning", "report", "notebook", "cli"},
    "run": {"observed", "planning", "notebook", "cli"},
    "observed": {"planning", "notebook", "cli"},
    "planning": {"notebook", "cli"},
    "report": {"notebook", "cli"},
    "notebook": set(),
}

Graph = Mapping[str, set[str]]


def imports(source: str, modules: Iterable[str]) -> set[str]:
    """The modules of kvsim that some source imports, inside functions and for type checkers alone included."""
    found, known = set(), set(modules)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in inner}
    return {name for name in found if name == FACE or name.startswith(f"{FACE}.")}


def graph_of(sources: Mapping[str, str]) -> Graph:
    """What each module imports."""
    return {name: imports(source, sources) for name, source in sources.items()}


def room(module: str) -> str:
    """The first part of a module's name below kvsim."""
    return module.split(".")[1]


def arrows_up(graph: Graph) -> list[str]:
    """Every import of a module from a room above its own, of the package's face, and of a room not open to it."""
    found = []
    for name, imported in graph.items():
        for other in imported if name != FACE else ():
            if other == FACE or ROOMS.index(room(other)) > ROOMS.index(room(name)):
                found.append(f"{name} imports {other}")
            elif room(name) not in {room(other), "__main__", *ONLY_BY.get(room(other), ROOMS)}:
                found.append(f"{name} imports {other}, open to {', '.join(sorted(ONLY_BY[room(other)]))} alone")
    return found


def circle(graph: Graph) -> list[str]:
    """The modules of a circle of imports; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def graph() -> Graph:
    paths = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    names = {path: ".".join(parts).removesuffix(".__init__") for path, parts in paths.items()}
    return graph_of({names[path]: path.read_text(encoding="utf-8") for path in paths})


def test_every_room_has_its_place(graph: Graph) -> None:
    assert {room(name) for name in graph if name != FACE} == set(ROOMS)
    unknown = {other for imported in graph.values() for other in imported} - set(graph)
    assert not unknown  # each name was resolved to a module that exists


def test_no_import_goes_up(graph: Graph) -> None:
    assert arrows_up(graph) == []


def test_no_modules_import_each_other_in_a_circle(graph: Graph) -> None:
    assert circle(graph) == []


def test_a_scenario_knows_nothing_of_who_plays_it(graph: Graph) -> None:
    below = {room(other) for name, imported in graph.items() if room_is(name, "scenario") for other in imported}
    assert below <= {"scenario", "text", "hardware", "models"}


def test_tests_reach_the_engine_by_what_it_opens_to_them(graph: Graph) -> None:
    """But for those of its compiler, which stand in for parts of that."""
    of_compiler = {"test_player.py", "test_kept_code.py", Path(__file__).name}
    inside = {name for name in graph if room_is(name, "engine")} - {"kvsim.engine.testing"}
    for path in Path(__file__).parent.rglob("*.py"):
        if path.name not in of_compiler:
            assert not imports(path.read_text(encoding="utf-8"), graph) & inside, path
    assert not any("kvsim.engine.testing" in imported for imported in graph.values())


def room_is(module: str, name: str) -> bool:
    """Whether a module lies in a room."""
    return module != FACE and room(module) == name


BROKEN = {
    "kvsim.text.a": "def f():\n    from kvsim.engine import loop\n",
    "kvsim.engine": "",
    "kvsim.engine.loop": "from kvsim.engine.desk import Desk\n",
    "kvsim.engine.desk": "def f():\n    import kvsim.engine.loop\n",
    "kvsim.engine.face": "from kvsim import simulate\n",
    "kvsim.results.summary": "",
    "kvsim.explain.costs": "if TYPE_CHECKING:\n    from kvsim.results.summary import Result\n",
    "kvsim.cli.simulate": "from kvsim.results.summary import summarize\nfrom kvsim.engine.loop import play\n",
}


def test_the_rules_are_seen_to_bite() -> None:
    graph = graph_of(BROKEN)
    assert arrows_up(graph) == [
        "kvsim.text.a imports kvsim.engine.loop",
        "kvsim.engine.face imports kvsim",
        "kvsim.explain.costs imports kvsim.results.summary",
    ]
    assert set(circle(graph)) == {"kvsim.engine.loop", "kvsim.engine.desk"}
    closed = graph_of({"kvsim.report.page": "", "kvsim.run.a": "", "kvsim.report.b": "from kvsim.run.a import x\n"})
    assert arrows_up(closed) == ["kvsim.report.b imports kvsim.run.a, open to cli, notebook, observed, planning alone"]
