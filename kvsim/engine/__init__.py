"""The inner loop of the simulator: plain functions over arrays that run as they are, or compiled by numba."""
