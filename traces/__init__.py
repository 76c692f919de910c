"""Request traces: loaders of the public formats, bundled samples, a synthetic generator and statistics."""

from traces.catalogue import Bundled, load, names
from traces.schema import Trace, TraceError
from traces.write import write

__all__ = ["Bundled", "Trace", "TraceError", "load", "names", "write"]
