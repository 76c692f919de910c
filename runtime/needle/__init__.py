"""needle-28m, the trained long-context model that the project ships: its weights, and examples with known answers."""

from runtime.needle.evals import Example, load_evals
from runtime.needle.expand import expand

__all__ = ["Example", "expand", "load_evals"]
