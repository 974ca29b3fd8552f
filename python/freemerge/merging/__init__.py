"""Merging checkpoints and state dicts."""
