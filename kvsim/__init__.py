"""Simulator and capacity planner of KV-cache memory hierarchies."""
