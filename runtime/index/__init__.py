"""Indexes of keys: which in host memory have the largest inner product with a query; `segments`: clusters of a text."""

from runtime.index.base import Found, Index
from runtime.index.flat import Flat
from runtime.index.graph import Graph, GraphParameters, link
from runtime.index.ivf import Ivf, Lists

__all__ = ["Flat", "Found", "Graph", "GraphParameters", "Index", "Ivf", "Lists", "link"]
