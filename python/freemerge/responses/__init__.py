"""Frequency responses: which DFT bins of a task vector are kept, and how strongly.

A response M acts on an H x W matrix as ``y = Re(ifft2(M * fft2(x)))``. On a real x that equals filtering with the
symmetrised mask ``M_s(k, l) = (M(k, l) + M(-k, -l)) / 2``, so every mask here is symmetrised and only columns
0 .. W//2 are ever evaluated. Bins are in stored (unshifted) FFT order; kappa is the signed frequency of a bin,
``k if k <= n // 2 else k - n``.

This package is the only Python definition of the masks; ``csrc/common/mask.h`` is its C++ twin. A module added to it
is imported with it, and its responses are found here by name.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import RESPONSES, Box, Gains, MaskParams, Response, matrix_shape, signed_frequencies
from .butterworth import Butterworth
from .center import Center
from .config import from_config, to_config, to_record
from .custom import Custom, MaskFunction
from .gaussian import Gaussian
from .official import Official
from .radial import CutoffUnit, Metric
from .steps import BandGain, BandPass, BandStop, HighPass, LowPass
from .transposed import has_closed_form, holds_array, transposed

__all__ = [
    "BandGain",
    "BandPass",
    "BandStop",
    "Box",
    "Butterworth",
    "Center",
    "Custom",
    "CutoffUnit",
    "Gains",
    "Gaussian",
    "HighPass",
    "LowPass",
    "MaskFunction",
    "MaskParams",
    "Metric",
    "Official",
    "RESPONSES",
    "Response",
    "from_config",
    "has_closed_form",
    "holds_array",
    "matrix_shape",
    "signed_frequencies",
    "to_config",
    "to_record",
    "transposed",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
globals().update(RESPONSES)
__all__ += [name for name in RESPONSES if name not in __all__]
