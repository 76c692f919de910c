"""What a replica runs next and what that takes: scheduling, memory, iterations and runs of them."""
