"""Sessions: whose turn goes on from which, and where their state is in between."""
