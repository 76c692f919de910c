"""The offloading runtime: executes policies' plans inside Hugging Face `generate`."""

from runtime.call import Call, Gather, Method, Piece
from runtime.offload import Offload, offload

__all__ = ["Call", "Gather", "Method", "Offload", "Piece", "offload"]
