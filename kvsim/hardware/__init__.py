"""How fast the machine is: GPUs, hosts, their links, and what an operation costs on them."""
