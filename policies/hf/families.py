"""The table of architectures: for each `model_type`, how its layers are made."""

from collections.abc import Mapping
from types import MappingProxyType

from policies.hf.custom_families import CUSTOM
from policies.hf.dense_families import DENSE
from policies.hf.family import Family
from policies.hf.linear_families import LINEAR
from policies.hf.sparse_families import SPARSE

FAMILIES: Mapping[str, Family] = MappingProxyType({**DENSE, **SPARSE, **LINEAR, **CUSTOM})
