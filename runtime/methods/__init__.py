"""The torch code of each policy: a module with its name, imported when the policy is used."""

from importlib import import_module
from importlib.util import find_spec

from policies import POLICIES, Policy
from runtime.call import Method


def method_of(policy: Policy) -> Method:
    """The method of a policy; ValueError when the runtime does not execute it, naming the policies that it does."""
    module = f"{__name__}.{policy.name.replace('-', '_')}"
    if find_spec(module) is None:
        known = ", ".join(name for name in POLICIES if find_spec(f"{__name__}.{name.replace('-', '_')}"))
        raise ValueError(f"the runtime does not execute policy {policy.name!r} yet; it executes {known}")
    method: Method = import_module(module).method(policy)
    return method
