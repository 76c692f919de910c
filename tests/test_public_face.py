"""What `from kvsim import ...` gives: names that stay, imported when they are used, and what users do with them."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvsim
import traces
from policies import Full, parse_policy
from policies.plan import Tier
from traces.counts import Recording

ROOT = Path(__file__).parents[1]


def setup(**options: Any) -> "kvsim.Setup":
    return kvsim.Setup(
        model=kvsim.load_model("llama-3.1-8b"),
        policy=Full(),
        gpu=kvsim.load_gpu("h100-sxm"),
        host=kvsim.load_host("ddr5-dual-xeon"),
        **options,
    )


@pytest.fixture(scope="module")
def result() -> "kvsim.Result":
    return kvsim.simulate(traces.load("azure-2023-code", limit=20), setup())


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def chosen(option: str, names: tuple[str, ...], **needed: Any) -> bool:
    """Whether an option takes these names, and no other one."""
    for name in names:
        setup(**needed, **{option: name})
    with pytest.raises(ValueError, match=f"unknown {option} 'none-such'.*known: "):
        setup(**needed, **{option: "none-such"})
    return True


CACHED = {"prefix_cache_ddr_bytes": 10**9}
NEEDED = {"trace": "azure-2023-code", "limit": 3, "model": "llama-3.1-8b", "gpu": "h100-sxm"}
USES: Mapping[str, Callable[[], bool]] = {
    "EVICTIONS": lambda: chosen("prefix_cache_eviction", kvsim.EVICTIONS, **CACHED),
    "ROUTERS": lambda: chosen("router", kvsim.ROUTERS, **CACHED),
    "SCHEDULERS": lambda: chosen("scheduler", kvsim.SCHEDULERS),
    "SESSION_KVS": lambda: chosen("session_kv", kvsim.SESSION_KVS),
    "Gpu": lambda: isinstance(kvsim.load_gpu("h100-sxm@datasheet"), kvsim.Gpu),
    "Host": lambda: isinstance(kvsim.load_host("grace"), kvsim.Host),
    "Result": lambda: "requests" in kvsim.Result.__dataclass_fields__,
    "Scenario": lambda: isinstance(kvsim.load_scenario(NEEDED), kvsim.Scenario),
    "Setup": lambda: replace(setup(gpus=4), tp=2).replicas == 2,
    "Speculation": lambda: (
        kvsim.Speculation(guesses=2, acceptance=(0.5,), candidates=2, method="lookup").tokens_per_step == 1.75
    ),
    "Tenant": lambda: setup(tenants={"a": kvsim.Tenant(weight=2)}).tenants["a"].weight == 2,
    "__version__": lambda: re.fullmatch(r"\d+\.\d+\.\d+", kvsim.__version__) is not None,
    "default_host": lambda: kvsim.default_host("gb200") == "grace",
    "format_bytes": lambda: kvsim.format_bytes(3 * 2**30) == "3 GiB",
    "format_s": lambda: kvsim.format_s(0.0025) == "2.5 ms",
    "gpu_names": lambda: kvsim.load_gpu(kvsim.gpu_names()[0]).name == kvsim.gpu_names()[0],
    "host_names": lambda: kvsim.load_host(kvsim.host_names()[0]).name == kvsim.host_names()[0],
    "load_gpu": lambda: kvsim.load_gpu("h100-sxm").memory_bytes == 80 * 2**30,
    "load_host": lambda: kvsim.load_host("grace").gpus_max >= 1,
    "load_model": lambda: kvsim.load_model("llama-3.1-8b").params == 8_030_261_248,
    "load_scenario": lambda: len(kvsim.load_scenario(NEEDED).load_trace()) == 3,
    "model_names": lambda: "llama-3.1-8b" in kvsim.model_names(),
}


@pytest.mark.parametrize("name", sorted(USES))
def test_a_name_does_what_it_is_for(name: str) -> None:
    assert USES[name]()


def test_simulate_and_latencies_give_columns_of_every_request(result: "kvsim.Result") -> None:
    columns = result.requests | kvsim.latencies(result)
    assert {len(column) for column in columns.values()} == {20}
    finished = columns["status"] == "finished"
    assert finished.all()
    np.testing.assert_allclose(columns["ttft_s"], columns["first_token_s"] - columns["arrival_s"])


def test_summarize_and_write_results_say_the_same(result: "kvsim.Result", tmp_path: Path) -> None:
    slo = {"ttft_s": 1.0}
    kvsim.write_results([result], tmp_path / "out", slo=slo, warmup_s=1.0)
    written = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert written == kvsim.summarize(result, slo, 1.0)
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_sweep_keeps_what_single_runs_give() -> None:
    trace = traces.load("azure-2023-code", limit=5)
    jobs = [kvsim.Job(trace, setup(gpus=gpus)) for gpus in (1, 2)]
    wrong = kvsim.Job(trace, setup(session_kv="keep"))  # of a trace without sessions
    found = dict(kvsim.sweep([*jobs, wrong], kvsim.summarize))
    for index, job in enumerate(jobs):
        assert found[index]["run_id"] == kvsim.summarize(kvsim.simulate(job.trace, job.setup))["run_id"]
    assert isinstance(found[2], kvsim.Failure)
    assert "has no sessions" in found[2].reason


def test_replay_moved_bytes_are_those_counted_by_hand() -> None:
    # A layer's keys and values of a token: 2 x 8 heads x 64 x 2 bytes. Those of the 64 past tokens come up, the new
    # token's go down, on two of the layers.
    token_bytes = 2 * 8 * 64 * 2
    steps = np.array(
        [[0, layer, 64, 64, 64, 1] for layer in (0, 1)]
    )  # sequence, layer, first prompt, prompt, past, new
    moved = kvsim.replay_moved_bytes(Recording(steps), parse_policy("offload-all"), kvsim.load_model("llama-3.2-1b"))
    assert moved == {(Tier.DDR, Tier.HBM): 2 * 64 * token_bytes, (Tier.HBM, Tier.DDR): 2 * token_bytes}


def test_the_names_are_those_for_type_checkers_and_all_have_a_use() -> None:
    tree = ast.parse(Path(kvsim.__file__).read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    pairs = {
        (alias.name, node.module) for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert dict(pairs) == kvsim._MODULES
    assert {*dict(pairs), "__version__"} == set(kvsim.__all__)
    tested = {"Failure", "Job", "simulate", "sweep", "latencies", "summarize", "write_results", "replay_moved_bytes"}
    tested |= {"Plan", "plan", "Comparison", "compare"}  # in tests/kvsim/test_plan.py, tests/kvsim/test_notebook.py
    assert set(USES) | tested == set(kvsim.__all__)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").partition("Which GPU")[0]
    assert {name for name in kvsim.__all__ if f"`{name}" not in page} == {"__version__"}


def test_no_name_is_that_of_a_package_inside() -> None:
    inside = {path.stem for path in (ROOT / "kvsim").iterdir()}
    assert not inside & set(kvsim.__all__)


def test_an_unknown_name_is_an_error_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'kvsim' has no attribute 'simulat'"):
        kvsim.simulat  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'simulat' from 'kvsim'"):
        exec("from kvsim import simulat")  # noqa: S102
    assert set(kvsim.__all__) <= set(dir(kvsim))


def test_import_costs_nothing() -> None:
    assert fresh("import sys, kvsim; print({'numpy', 'pydantic', 'typer'} & set(sys.modules))") == "set()"
    seconds = fresh("import time; t = time.process_time(); import kvsim; print(time.process_time() - t)")
    assert float(seconds) < 0.3


def test_a_star_gives_all_names() -> None:
    assert fresh("from kvsim import *; print(Setup.__name__, simulate.__name__, load_gpu.__name__)") == (
        "Setup simulate load_gpu"
    )


def test_the_page_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    sweep, notebook, kernels = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(sweep, {})  # noqa: S102
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["l40s", "h100-sxm"]
    scope: dict[str, Any] = {}
    exec(notebook, scope)  # noqa: S102
    columns = scope["columns"]
    assert columns["prompt_tokens"][scope["longest"]] == columns["prompt_tokens"].max()
    exec(kernels, {})  # noqa: S102
