"""The torch code of each policy: a module with its name, imported when the policy is used."""

import sys
from importlib import import_module
from importlib.util import find_spec

from policies import POLICIES, Policy
from runtime.call import Method


def method_of(policy: Policy) -> Method:
    """The method of a policy: of a policy from outside the project, what `method(policy)` beside its class returns.

    Raises ValueError when the runtime does not execute the policy, naming those that it does.
    """
    home = type(policy).__module__
    if home.startswith("policies."):
        home = f"{__name__}.{policy.name.replace('-', '_')}"
        if find_spec(home) is None:
            known = ", ".join(name for name in POLICIES if find_spec(f"{__name__}.{name.replace('-', '_')}"))
            raise ValueError(f"the runtime does not execute policy {policy.name!r} yet; it executes {known}")
        import_module(home)
    make = getattr(sys.modules[home], "method", None)
    if make is None:
        raise ValueError(
            f"the runtime executes a policy from outside when a function method(policy) stands beside its class, which "
            f"returns a runtime.Method; module {home!r} of {policy.name} has none"
        )
    method: Method = make(policy)
    return method
