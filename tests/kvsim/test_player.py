"""Interpreter and machine code play the same, to the bit, whoever goes on where the other stopped."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenarios import BLOCK, SMALL, TOKEN_BYTES, with_room
from simulated import random_trace, setup, trace

from kvsim.engine import player
from kvsim.engine.code_folder import code_folders, make
from kvsim.engine.features import FEATURES, needs
from kvsim.engine.loop import play
from kvsim.engine.player import Player
from kvsim.engine.state.layout import from_text, layout_of, to_text
from kvsim.results.summary import Result
from kvsim.run.simulate import _Cluster, simulate
from kvsim.scenario.choices import EVICTIONS
from kvsim.scenario.setup import Setup
from kvsim.scenario.speculation import Speculation
from kvsim.scenario.tenants import Tenant
from traces import Trace

Scenario = tuple[Trace, Setup]
ROOT = Path(__file__).parents[2]


def requests_of(seed: int, n: int = 40, **columns: Any) -> Trace:
    rng = np.random.default_rng(seed)
    arrival_s, prompts = np.sort(rng.uniform(0, 0.6, n)), rng.integers(1, 1200, n)
    return trace(arrival_s, prompts, rng.integers(1, 60, n), **columns)


def cached(seed: int) -> Trace:
    """Prompts that share up to three histories, of two tenants."""
    rng, plain = np.random.default_rng(seed), requests_of(seed)
    counts = plain.prompt_tokens // BLOCK
    ids = [1000 * rng.integers(0, 3) + np.arange(count) for count in counts]
    columns = {"block_tokens": BLOCK, "block_ids": np.concatenate(ids), "block_counts": counts}
    return requests_of(seed, **columns, tenant=np.arange(len(plain)) % 2, tenants=("a", "b"))


def conversation(seed: int) -> Trace:
    """Three sessions whose turns go on from each other."""
    n = 30
    rng = np.random.default_rng(seed)
    said, prompts, outputs = [0, 0, 0], [], rng.integers(1, 40, n)
    for i in range(n):
        prompts.append(said[i % 3] + int(rng.integers(1, 200)))
        said[i % 3] = prompts[-1] + int(outputs[i])
    columns = {"session": np.arange(n) % 3, "think_s": rng.uniform(0, 0.05, n)}
    return trace(np.cumsum(rng.uniform(0, 0.02, n)), prompts, outputs, **columns)


def tight(policy: str = "full", tokens: int = 2000, **options: Any) -> Setup:
    """A small model in memory that holds so many tokens for a replica."""
    return with_room(setup(policy, model=SMALL, **options), tokens * TOKEN_BYTES, 2 * tokens * TOKEN_BYTES)


def plain_scenarios() -> Iterator[Scenario]:
    """What the core does: any policy, several replicas, preemption either way, chunks, heads and layers apart."""
    yield random_trace(1, 30), setup("full", gpus=2)
    yield random_trace(2, 20), setup("shadowkv", gpus=4, tp=2)
    yield random_trace(3, 20), setup("retrieval-attention", gpus=2)
    yield random_trace(4, 20), setup("full@heads=2+sink-window@heads=6", max_num_batched_tokens=512)
    yield requests_of(5), tight(preemption="swap", gpus=2, router="least-loaded")
    yield requests_of(6), tight(preemption="recompute", gpus=2)
    yield requests_of(7), tight("offload-all", max_num_seqs=4)


def featured_scenarios() -> Iterator[Scenario]:
    """Each feature by itself and beside others."""
    tenants = {"a": Tenant(priority=1, weight=2.0, quota=0.5)}
    tiers = {"prefix_cache_hbm_bytes": 1 << 24, "prefix_cache_ddr_bytes": 1 << 26, "prefix_cache_nvme_bytes": 1 << 28}
    for i, eviction in enumerate(EVICTIONS):
        options = {**tiers, "prefix_cache_eviction": eviction, "prefix_cache_write": ("through", "back")[i % 2]}
        yield cached(i), tight(gpus=2, **options, prefix_cache_reuse=("always", "cheaper")[i % 2])
    for router in ("prefix-affinity", "kv-aware"):
        yield cached(11), tight(gpus=4, **tiers, router=router, prefix_cache_prefetch=True)
    for scheduler in ("priority", "fair"):
        yield cached(12), tight(gpus=2, scheduler=scheduler, tenants=tenants, timeout_s=0.2)
    for session_kv in ("keep", "swap", "cheapest"):
        yield conversation(13), tight(gpus=2, session_kv=session_kv, sessions="closed")
    yield requests_of(14), tight(gpus=4, prefill_gpus=2, tokens=4000)
    yield requests_of(15), setup("full", model=SMALL, gpus=6, pp=3)
    yield requests_of(18), setup("offload-all", model=SMALL, gpus=8, pp=2, tp=2)
    yield requests_of(19), setup("retrieval-attention", gpus=8, pp=4, max_num_batched_tokens=512)
    guesses = Speculation(guesses=2, acceptance=(0.6, 0.5), candidates=2, method="lookup", draft=None, draft_share=0.25)
    yield requests_of(16), tight(gpus=2, speculation=guesses, timeout_s=0.05)
    yield requests_of(17), setup("shadowkv", model=SMALL, gpus=2, perfetto=(0.1, 0.2))


def outcome(scenario: Scenario) -> dict[str, Any]:
    """All that a simulation gives but how long it took."""
    result: Result = simulate(*scenario)
    found = {field.name: getattr(result, field.name) for field in fields(Result)}
    return {name: value for name, value in found.items() if not name.endswith(("cpu_s", "wall_s"))}


def assert_same(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_same(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, where
        assert one.tobytes() == other.tobytes() if one.dtype != object else one.tolist() == other.tolist(), where
    elif hasattr(one, "__dict__"):
        assert_same(vars(one), vars(other), where)
    else:
        assert one == other or one != one, where  # noqa: PLR0124 - NaN


class Taking(Player):
    """Turns are taken by machine code and by the interpreter, as chance will have it."""

    rng = np.random.default_rng(0)

    def play(self, cluster: Any, prices: Any, most_events: int) -> bool:
        events = int(self.rng.integers(1, 200))
        if self.rng.integers(2):
            return play(cluster, prices, -1, 0.0, min(events, most_events))
        return super().play(cluster, prices, min(events, most_events))


@pytest.fixture
def codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], Any]:
    """An empty folder for code, and what this process has loaded of it."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "code"))
    monkeypatch.delenv("KVSIM_COMPILE", raising=False)
    loaded: dict[tuple[str, ...], Any] = {}
    monkeypatch.setattr(player, "_codes", loaded)
    return loaded


@pytest.mark.parametrize(("features", "scenarios"), [((), plain_scenarios), (FEATURES, featured_scenarios)])
def test_machine_code_and_interpreter_give_the_same_bits(
    features: tuple[str, ...],
    scenarios: Any,
    codes: dict[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("KVSIM_COMPILE", "never")
    interpreted = [outcome(scenario) for scenario in scenarios()]
    monkeypatch.setenv("KVSIM_COMPILE", "first")
    with monkeypatch.context() as patch:  # code with these features, whatever the simulation has
        patch.setattr("kvsim.engine.state.initial._features", lambda *_: features)
        simulate(requests_of(0, 3), setup("full", model=SMALL))
    assert list(codes) == [features]
    for scenario, expected in zip(scenarios(), interpreted, strict=True):
        assert_same(outcome(scenario), expected)
    monkeypatch.setattr("kvsim.engine.desk.Player", Taking)
    for scenario, expected in zip(scenarios(), interpreted, strict=True):
        assert_same(outcome(scenario), expected)
    assert list(codes) == [features]
    assert loaded_by(tmp_path / "code", 300) == {"kvsim.engine.machine_code", "llvmlite"}


def loaded_by(folder: Path, requests: int) -> set[str]:
    """What belongs to machine code of the modules that a program has loaded in the end, given a folder of code."""
    program = """
import sys
from kvsim.__main__ import main
assert main(sys.argv[1:]) == 0
print(*{"kvsim.engine.machine_code", "kvsim.engine.compiled", "llvmlite", "numba"} & set(sys.modules))
"""
    options = f"--trace azure-2023-code --limit {requests} --model llama-3.1-8b --gpu h100-sxm --gpus 1 --policy full"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(folder), "KVSIM_COMPILE": ""}
    command = [sys.executable, "-c", program, "simulate", *options.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_scenarios_have_the_features_that_they_are_for() -> None:
    assert not any(features_of(scenario) for scenario in plain_scenarios())
    assert {feature for scenario in featured_scenarios() for feature in features_of(scenario)} == set(FEATURES)


def features_of(scenario: Scenario) -> tuple[str, ...]:
    return engine_of(scenario).cluster.features


def engine_of(scenario: Scenario) -> Any:
    return _Cluster(*scenario).engine


def test_a_run_that_lasts_is_compiled_beside_and_changes_over(
    codes: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the compiler that says it is done, and for the code."""
    asked: list[Any] = []

    class Code:
        def references(self, *state: Any) -> Any:
            return state

        def play(self, *given: Any) -> bool:
            asked.append("played")
            return play(*given)

    def compile_beside(folder: Any, *_: Any) -> Any:
        asked.append(folder.path)
        done = subprocess.Popen([sys.executable, "-c", ""])
        done.wait()
        return done

    def load(folder: Any, *_: Any) -> Any:
        if not asked:
            return None
        codes[folder.features] = Code()
        return codes[folder.features]

    monkeypatch.setattr(player, "_compile_beside", compile_beside)
    monkeypatch.setattr(player, "_load", load)
    for name, seconds in {"LOAD_S": 0.0, "COMPILE_S": 0.0, "_SLICE_S": 1e-4, "_LOOK_AGAIN_S": 1e-4}.items():
        monkeypatch.setattr(player, name, seconds)
    scenario = next(plain_scenarios())
    monkeypatch.setenv("KVSIM_COMPILE", "never")
    expected = outcome(scenario)
    assert not asked
    monkeypatch.delenv("KVSIM_COMPILE")
    assert_same(outcome(scenario), expected)
    folder, *_ = code_folders(())
    assert asked[:2] == [folder.path, "played"]
    assert_same(outcome(next(plain_scenarios())), expected)
    assert folder.path not in asked[1:]


def test_a_short_run_loads_no_machine_code(tmp_path: Path) -> None:
    assert loaded_by(tmp_path, 5) == set()
    assert not list(tmp_path.iterdir())


def test_code_that_is_damaged_is_not_used(codes: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, *_ = code_folders(())
    assert make(folder)
    folder.keep(b"play\nno object file", "")
    (folder.path / "play.code").write_bytes(b"damaged")
    for name, seconds in {"LOAD_S": 0.0, "COMPILE_S": math.inf, "_SLICE_S": 1e-4}.items():
        monkeypatch.setattr(player, name, seconds)
    found = outcome(next(plain_scenarios()))
    assert not codes
    monkeypatch.setenv("KVSIM_COMPILE", "never")
    assert_same(outcome(next(plain_scenarios())), found)


def test_no_folder_for_code_is_said_once(codes: dict[Any, Any], monkeypatch: Any, capfd: Any, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("in the way")
    for name, seconds in {"LOAD_S": 0.0, "COMPILE_S": 0.0, "_SLICE_S": 1e-4, "_LOOK_AGAIN_S": 1e-4}.items():
        monkeypatch.setattr(player, name, seconds)
    simulate(*next(plain_scenarios()))
    said = capfd.readouterr().err
    assert said.count("warning: the simulator cannot be compiled, or not be kept in") == 1
    assert not codes


def test_an_unknown_time_to_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSIM_COMPILE", "later")
    with pytest.raises(ValueError, match="KVSIM_COMPILE: 'later' must be first, beside or never"):
        simulate(*next(plain_scenarios()))


def test_code_with_more_features_serves(codes: dict[Any, Any]) -> None:
    for features in (("caches",), ("caches", "sessions"), FEATURES, ("tenants",)):
        assert make(code_folders(features)[0])
    found = [folder.features for folder in code_folders(("caches",))]
    assert found == [("caches",), ("caches", "sessions"), FEATURES]


def test_the_compiler_ends_with_its_program(codes: dict[Any, Any]) -> None:
    engine = engine_of(next(plain_scenarios()))
    folder, *_ = code_folders(())
    make(folder)
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    layouts = "\n".join(to_text(layout_of(state)) for state in (engine.cluster, engine._prices))
    arguments = [str(program.pid), "", str(folder.path)]
    command = [sys.executable, "-m", "kvsim.engine.compile_beside", *arguments]
    compiler = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)
    compiler.stdin.write(layouts.encode())  # type: ignore[union-attr]
    compiler.stdin.close()  # type: ignore[union-attr]
    while not (folder.path / "compiling").exists():
        time.sleep(0.05)
    program.kill()
    program.wait()
    assert compiler.wait(30) == 1
    assert not (folder.path / "play.code").exists()


def test_layouts_are_read_back() -> None:
    engine = engine_of(next(featured_scenarios()))
    for state in (engine.cluster, engine._prices):
        assert from_text(to_text(layout_of(state))) == layout_of(state)


def test_the_state_of_every_simulation_has_the_same_layouts() -> None:
    """Code is kept for one: otherwise simulations with the same features would compile in turns."""
    engines = [engine_of(scenario) for scenario in [*plain_scenarios(), *featured_scenarios()]]
    assert len({player._layouts(engine.cluster, engine._prices) for engine in engines}) == 1


def test_an_interruption_comes_between_two_events(codes: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The books are whole: of a run that is cut off, every request is finished, or not yet."""
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    requests = random_trace(1, 3000, span_s=1000.0, prompts=(100, 2000))
    timer.start()
    cut = simulate(requests, setup("full", gpus=2), lambda _: None)
    timer.join()
    assert cut.partial
    assert set(cut.requests["status"]) <= {"finished", "unfinished"}


def test_a_feature_must_be_known() -> None:
    with pytest.raises(ValueError, match="there is no feature 'magic'; features: caches, handoff"):
        needs("magic")
