"""What task vectors have in common, before and after merging: measures by band, layer and module, and a report."""

from .measures import FilterEffect, Measures, MethodMeasures, Spectrum
from .result import Analysis, TensorMeasures
from .run import analyze

__all__ = ["Analysis", "FilterEffect", "Measures", "MethodMeasures", "Spectrum", "TensorMeasures", "analyze"]
