"""Merge fine-tuned models in the frequency domain: FR-Merging and FREE-Merging."""

__version__ = "0.1.0"  # before the imports: the manifest records it

from .errors import ArgumentError, BackendError, CheckpointError, FreemergeError, RefusedError
from .inspection import Decision, Inspection
from .pipeline import Report, inspect, merge, merge_checkpoints
from .recipe import Recipe
from .responses import (
    BandGain,
    BandPass,
    BandStop,
    Butterworth,
    Center,
    Custom,
    Gaussian,
    HighPass,
    LowPass,
    Official,
    Response,
)
from .spectral.dispatch import backends
from .spectral.filter import explain, filter_, filtered
from .task_vector import Rule, Split, Stack

__all__ = [
    "ArgumentError",
    "BackendError",
    "BandGain",
    "BandPass",
    "BandStop",
    "Butterworth",
    "Center",
    "CheckpointError",
    "Custom",
    "Decision",
    "FreemergeError",
    "Gaussian",
    "HighPass",
    "Inspection",
    "LowPass",
    "Official",
    "Recipe",
    "RefusedError",
    "Report",
    "Response",
    "Rule",
    "Split",
    "Stack",
    "backends",
    "explain",
    "filter_",
    "filtered",
    "inspect",
    "merge",
    "merge_checkpoints",
]
