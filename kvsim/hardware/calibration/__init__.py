"""From measured times of a machine's kernels to the constants of their prices, and to a GPU's file."""
