"""How much to buy: the fewest GPUs that serve a trace within an SLO, what they cost, and what breaks first."""
