"""Published figures, one file for each paper, and kvsim beside them."""
