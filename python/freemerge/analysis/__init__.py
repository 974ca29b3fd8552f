"""What task vectors have in common, before and after merging: measures by band, layer and module, and a report."""

from .measures import FilterEffect, Measures, MethodMeasures, Spectrum
from .run import Analysis, TensorMeasures, analyze

__all__ = ["Analysis", "FilterEffect", "Measures", "MethodMeasures", "Spectrum", "TensorMeasures", "analyze"]
