"""Merge fine-tuned models in the frequency domain: FR-Merging and FREE-Merging."""

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

__version__ = "0.1.0"

__all__ = [
    "BandGain",
    "BandPass",
    "BandStop",
    "Butterworth",
    "Center",
    "Custom",
    "Gaussian",
    "HighPass",
    "LowPass",
    "Official",
    "Response",
    "backends",
    "explain",
    "filter_",
    "filtered",
]
