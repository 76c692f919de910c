"""The `op` fidelity: every operation a process of SimPy, and every link shared."""
