"""How long an iteration takes: its operations priced, then put in order on the lanes."""
