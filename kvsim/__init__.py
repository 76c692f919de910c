"""Simulator and capacity planner of KV-cache memory hierarchies.

The names of `__all__` are its public face, which scripts and notebooks may rely on (`docs/python.md`); all other
modules move freely behind it. Each name is imported when it is first used, so that `import kvsim` costs nothing.
"""

from typing import TYPE_CHECKING

from kvsim.version import __version__

if TYPE_CHECKING:
    from kvsim.hardware.catalogue import Gpu, Host, gpu_names, host_names, load_gpu, load_host
    from kvsim.models import load_model, model_names
    from kvsim.notebook.compared import Comparison, compare
    from kvsim.notebook.planned import Plan, plan
    from kvsim.plans.replay import replay_moved_bytes
    from kvsim.report.written import write_results
    from kvsim.results.summary import Result, latencies, summarize
    from kvsim.run.jobs import Job
    from kvsim.run.simulate import simulate
    from kvsim.run.sweep import Failure, sweep
    from kvsim.scenario.choices import EVICTIONS, ROUTERS, SCHEDULERS, SESSION_KVS
    from kvsim.scenario.scenario_file import Scenario, default_host, load_scenario
    from kvsim.scenario.setup import Setup
    from kvsim.scenario.speculation import Speculation
    from kvsim.scenario.tenants import Tenant
    from kvsim.text.units import format_bytes, format_s

__all__ = [
    "EVICTIONS",
    "ROUTERS",
    "SCHEDULERS",
    "SESSION_KVS",
    "Comparison",
    "Failure",
    "Gpu",
    "Host",
    "Job",
    "Plan",
    "Result",
    "Scenario",
    "Setup",
    "Speculation",
    "Tenant",
    "__version__",
    "compare",
    "default_host",
    "format_bytes",
    "format_s",
    "gpu_names",
    "host_names",
    "latencies",
    "load_gpu",
    "load_host",
    "load_model",
    "load_scenario",
    "model_names",
    "plan",
    "replay_moved_bytes",
    "simulate",
    "summarize",
    "sweep",
    "write_results",
]

if not TYPE_CHECKING:
    _STANDS_IN = {  # the same for the interpreter, which imports a module when one of its names is asked for
        "hardware.catalogue": ("Gpu", "Host", "gpu_names", "host_names", "load_gpu", "load_host"),
        "models": ("load_model", "model_names"),
        "notebook.compared": ("Comparison", "compare"),
        "notebook.planned": ("Plan", "plan"),
        "plans.replay": ("replay_moved_bytes",),
        "report.written": ("write_results",),
        "results.summary": ("Result", "latencies", "summarize"),
        "run.jobs": ("Job",),
        "run.simulate": ("simulate",),
        "run.sweep": ("Failure", "sweep"),
        "scenario.choices": ("EVICTIONS", "ROUTERS", "SCHEDULERS", "SESSION_KVS"),
        "scenario.scenario_file": ("Scenario", "default_host", "load_scenario"),
        "scenario.setup": ("Setup",),
        "scenario.speculation": ("Speculation",),
        "scenario.tenants": ("Tenant",),
        "text.units": ("format_bytes", "format_s"),
    }
    _MODULES = {name: f"{__name__}.{module}" for module, names in _STANDS_IN.items() for name in names}

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
