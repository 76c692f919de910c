"""The offloading runtime: executes policies' plans inside Hugging Face `generate`."""

from runtime.offload import Offload, offload

__all__ = ["Offload", "offload"]
