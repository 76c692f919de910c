"""Prefix caches: tiers, what a prompt finds in them, and what goes when they are full."""
