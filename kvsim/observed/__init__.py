"""What clients of a running server measure: requests sent to one, records of them, and constants fitted to those."""
