"""The state of a simulation: arrays of records, their fields and their first values."""
