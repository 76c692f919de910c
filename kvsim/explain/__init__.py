"""What a long context costs in closed form, without a simulation."""
