"""Requests before they run: when they come, where they go, how they queue and how long they wait."""
