"""Merge fine-tuned models in the frequency domain: FR-Merging and FREE-Merging."""

__version__ = "0.1.0"  # before the imports: the manifest records it

from .backends.registry import backends
from .errors import ArgumentError, BackendError, CheckpointError, FreemergeError, RefusedError
from .experts import (
    Expert,
    ExpertBank,
    Routed,
    RoutedModel,
    Router,
    SavedExpert,
    extract_experts,
    iter_experts,
    save_experts,
)
from .filter import explain, filter_, filtered
from .merging.inspection import Decision, Inspection
from .merging.recipe import Recipe
from .merging.run import Report, inspect, merge, merge_checkpoints
from .merging.units import Rule, Split, Stack
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
    "Expert",
    "ExpertBank",
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
    "Routed",
    "RoutedModel",
    "Router",
    "Rule",
    "SavedExpert",
    "Split",
    "Stack",
    "backends",
    "explain",
    "extract_experts",
    "filter_",
    "filtered",
    "inspect",
    "iter_experts",
    "merge",
    "merge_checkpoints",
    "save_experts",
]
