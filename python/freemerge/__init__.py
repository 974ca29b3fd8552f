"""Merge fine-tuned models in the frequency domain: FR-Merging and FREE-Merging."""

__version__ = "0.1.0"
