"""Who may import whom: policies need the standard library alone, and torch stays in the runtime."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = {"policies", "traces", "kvsim", "runtime"}
ALLOWED_OWN = {
    "policies": {"policies"},
    "traces": {"traces"},
    "kvsim": {"kvsim", "policies", "traces"},
    "runtime": {"runtime", "policies", "traces"},
}
ALLOWED_THIRD_PARTY = {
    "policies": set(),
    "traces": {"numpy", "pyarrow"},
    "kvsim": {
        *("httpx", "jinja2", "llvmlite", "networkx", "numba", "numpy", "plotly", "pyarrow"),
        *("pydantic", "ray", "rich", "simpy", "typer", "yaml"),
    },
    "runtime": {"faiss", "numba", "numpy", "safetensors", "torch", "transformers", "triton"},
}
# Where the command line hands over to the runtime; the import stands inside a function, never at the top of the file.
MAY_IMPORT_RUNTIME = "kvsim/cli/"


def imported_packages(tree: ast.AST) -> set[str]:
    """Top-level packages that `tree` imports, at module level or inside functions."""
    packages = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides which package it names"
            packages.add((node.module or "").split(".")[0])
    return packages - set(sys.stdlib_module_names)


def sources() -> list[tuple[str, Path]]:
    return [(package, path) for package in sorted(OWN) for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize(("package", "path"), [pytest.param(*x, id=str(x[1].relative_to(ROOT))) for x in sources()])
def test_a_package_imports_only_what_it_may(package: str, path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = ALLOWED_OWN[package] | ALLOWED_THIRD_PARTY[package]
    if path.relative_to(ROOT).as_posix().startswith(MAY_IMPORT_RUNTIME):
        allowed.add("runtime")
        at_module_level = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "runtime" not in imported_packages(ast.Module(at_module_level, []))
    assert imported_packages(tree) <= allowed


def test_the_rule_is_seen_to_bite() -> None:
    tree = ast.parse("import os.path\nimport torch.nn\ndef f():\n    from kvsim.text.units import parse_tokens\n")
    assert imported_packages(tree) == {"torch", "kvsim"}


def modules_after(statement: str) -> set[str]:
    """Names of all modules that are loaded after `statement` ran in a fresh interpreter."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_torch_free_packages_leaves_torch_out() -> None:
    loaded = modules_after("import kvsim.cli.app, traces, policies")
    assert {"kvsim", "traces", "policies"} <= loaded
    assert not loaded & {"torch", "transformers", "runtime"}


def test_the_command_line_starts_without_heavy_packages() -> None:
    assert not modules_after("import kvsim.__main__") & {"jinja2", "numpy", "pyarrow", "plotly", "simpy", "networkx"}
