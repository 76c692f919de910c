"""Times of the runtime on the machine at hand: what `kvsim bench` prints."""
