"""Measurements of the machine at hand: what its kernels, copies and processors take, each with its spread."""
