"""The torch code of each policy, by the policy's name; a module is imported when its policy is used."""

from importlib import import_module

from policies import Policy
from runtime.executor import Method

MODULES = {
    "full": "runtime.methods.full",
    "offload-all": "runtime.methods.offload_all",
    "sink-window": "runtime.methods.sink_window",
}


def method_of(policy: Policy) -> Method:
    """The method of a policy; ValueError when the runtime does not execute it, naming the policies that it does."""
    if policy.name not in MODULES:
        raise ValueError(f"the runtime does not execute policy {policy.name!r} yet; it executes {', '.join(MODULES)}")
    method: Method = import_module(MODULES[policy.name]).method(policy)
    return method
