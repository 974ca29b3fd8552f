"""Merging methods."""
