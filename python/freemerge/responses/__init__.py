"""Frequency responses: which DFT bins of a task vector are kept, and how strongly.

A response M acts on an H x W matrix as ``y = Re(ifft2(M * fft2(x)))``. On a real x that equals filtering with the
symmetrised mask ``M_s(k, l) = (M(k, l) + M(-k, -l)) / 2``, so every mask here is symmetrised and only columns
0 .. W//2 are ever evaluated. Bins are in stored (unshifted) FFT order; kappa is the signed frequency of a bin,
``k if k <= n // 2 else k - n``.

This file is the only Python definition of the masks; ``csrc/common/mask.h`` is its C++ twin.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError

Gains = npt.NDArray[np.float64]
Unit = Literal["fraction", "bins"]
Metric = Literal["bins", "normalized"]
MaskFunction = Callable[[Gains, Gains, tuple[int, int]], npt.ArrayLike]

_ROWS_PER_BLOCK_ELEMENTS = 1 << 22  # bounds the memory of anything that walks a whole mask


@dataclass(frozen=True)
class MaskParams:
    """A response resolved for one shape: plain numbers that the C++ struct ``Mask`` mirrors field by field."""

    kind: str  #: a name of MASK_KINDS in csrc/common/mask.h
    height: int
    width: int
    unit_y: float = 1.0
    unit_x: float = 1.0
    edge0: float = 0.0
    edge1: float = 0.0
    gain0: float = 0.0
    gain1: float = 0.0
    gain2: float = 0.0
    order: float = 1.0
    axis: int = 1


@dataclass(frozen=True)
class Box:
    """Where a mask differs from ``background``: offsets ``|k| < band`` from DC, or from Nyquist, along each axis."""

    background: float
    bands: tuple[int, int]
    nyquist: tuple[bool, bool] = (False, False)


def signed_frequencies(n: int) -> Gains:
    """Signed frequency of each stored bin of an n-point DFT, in bins."""
    k = np.arange(n, dtype=np.float64)
    return np.where(k <= n // 2, k, k - n)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(H, W) of a filtered shape; a vector of n entries is the 1 x n matrix."""
    if len(shape) == 1:
        return 1, shape[0]
    return shape[-2], shape[-1]


def finite_number(value: object) -> float | None:
    """A finite real number as a Python float, which prints and serialises as one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _set_number(response: Response, name: str, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Check a field of a response and make it a Python float."""
    number = finite_number(getattr(response, name))
    if number is None or number < least or number <= above:
        bound = f" >= {least:g}" if math.isfinite(least) else f" > {above:g}" if math.isfinite(above) else ""
        raise ArgumentError(f"{name} must be a finite number{bound}, got {getattr(response, name)!r}")
    object.__setattr__(response, name, number)


@dataclass(frozen=True)
class Response:
    """Base class of all frequency responses: frozen, hashable, comparable, and their repr is code.

    Subclasses define :meth:`params` and :meth:`gain`; the rest follows. ``shape`` is (n,) for a vector or (H, W).
    """

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        """The response resolved for one shape, as the numbers the native kernels take."""
        raise TypeError(f"{type(self).__name__} has no closed form; its mask travels as an array")

    def gain(self, ky: Gains, kx: Gains, shape: tuple[int, ...]) -> Gains:
        """Symmetrised gain M_s at signed frequencies ``ky`` and ``kx`` (broadcast against each other)."""
        raise TypeError(f"{type(self).__name__} does not define gain()")

    def half_mask(self, shape: tuple[int, ...], rows: slice = slice(None)) -> Gains:
        """M_s on the stored half spectrum, float64, (H, W//2 + 1) or the given rows of it."""
        height, width = matrix_shape(shape)
        ky = signed_frequencies(height)[rows, None]
        kx = np.arange(width // 2 + 1, dtype=np.float64)[None, :]
        return np.broadcast_to(self.gain(ky, kx, shape), (ky.shape[0], kx.shape[1]))

    def mask(self, shape: tuple[int, ...]) -> Gains:
        """M_s on all H x W bins in stored order, float64. For inspection and tests: fast paths never build it."""
        height, width = matrix_shape(shape)
        ky = signed_frequencies(height)[:, None]
        return np.array(np.broadcast_to(self.gain(ky, signed_frequencies(width)[None, :], shape), (height, width)))

    def removed_fraction(self, shape: tuple[int, ...]) -> float:
        """Share of the spectrum this response removes at ``shape``: the mean over all bins of 1 - min(|M_s|, 1)."""
        height, width = matrix_shape(shape)
        weight = np.full(width // 2 + 1, 2.0)  # a half-spectrum column stands for itself and its mirror image
        weight[0] = 1.0
        if width % 2 == 0:
            weight[-1] = 1.0
        removed = 0.0
        for rows in _row_blocks(height, width // 2 + 1):
            removed += float((1.0 - np.minimum(np.abs(self.half_mask(shape, rows)), 1.0)).sum(axis=0) @ weight)
        return removed / (height * width)

    def box(self, shape: tuple[int, ...]) -> Box | None:
        """The small box of frequencies outside of which the mask is constant, if the response knows one."""
        return None

    def column_gains(self, shape: tuple[int, ...]) -> Gains:
        """For each half-spectrum column l, its gain if that is the same for every row frequency, else NaN."""
        height, width = matrix_shape(shape)
        low = np.full(width // 2 + 1, np.inf)
        high = np.full(width // 2 + 1, -np.inf)
        for rows in _row_blocks(height, width // 2 + 1):
            block = self.half_mask(shape, rows)
            np.minimum(low, block.min(axis=0), out=low)
            np.maximum(high, block.max(axis=0), out=high)
        return np.where(low == high, low, np.nan)


def _row_blocks(height: int, columns: int) -> list[slice]:
    step = max(1, _ROWS_PER_BLOCK_ELEMENTS // columns)
    return [slice(start, min(start + step, height)) for start in range(0, height, step)]


@dataclass(frozen=True)
class _ClosedForm(Response):
    """A response whose column classes follow from its :class:`MaskParams`, without a look at the mask."""

    def _columns(self, params: MaskParams) -> Gains:
        raise TypeError(f"{type(self).__name__} does not define _columns()")

    def column_gains(self, shape: tuple[int, ...]) -> Gains:
        return self._columns(self.params(shape))


@dataclass(frozen=True)
class _Radial(_ClosedForm):
    """A response of the radius of a bin only, measured in DFT bins or in cycles per sample (``metric``)."""

    def _units(self, shape: tuple[int, ...], metric: Metric) -> tuple[float, float]:
        height, width = matrix_shape(shape)
        return (1.0 / height, 1.0 / width) if metric == "normalized" else (1.0, 1.0)

    def _edge(self, value: float, shape: tuple[int, ...], unit: Unit, metric: Metric) -> float:
        if unit == "bins" or metric == "normalized":
            return float(value)
        # Rounding keeps 0.55 * 100 = 55.00000000000001 from losing the bins at radius 55.
        return round(value * min(shape[-2:]), 9)

    def _profile(self, radius: Gains, params: MaskParams) -> Gains:
        raise TypeError(f"{type(self).__name__} does not define _profile()")

    def gain(self, ky: Gains, kx: Gains, shape: tuple[int, ...]) -> Gains:
        params = self.params(shape)
        fy, fx = params.unit_y * ky, params.unit_x * kx
        return self._profile(np.sqrt(fy * fy + fx * fx), params)

    def _columns(self, params: MaskParams) -> Gains:
        # The radius grows with |ky|, and every profile here is monotone between its edges: the two ends decide,
        # unless both edges of a band fall inside one column.
        fx = params.unit_x * np.arange(params.width // 2 + 1, dtype=np.float64)
        fy = params.unit_y * float(params.height // 2)
        near, far = np.sqrt(fx * fx), np.sqrt(fy * fy + fx * fx)
        low, high = self._profile(near, params), self._profile(far, params)
        constant = low == high
        for edge in (params.edge0, params.edge1):
            constant &= ~((near < edge) & (far >= edge))
        return np.where(constant, low, np.nan)


def _band(edge: float, unit: float) -> int:
    """Number of frequencies 0, 1, 2, ... whose radius unit * k lies below the edge."""
    band = max(0, math.ceil(edge / unit))
    while band > 0 and unit * (band - 1) >= edge:
        band -= 1
    while unit * band < edge:
        band += 1
    return band


@dataclass(frozen=True)
class _Steps(_Radial):
    """Constant gains below, between and from two radii on: all the ideal (brick-wall) filters."""

    def _steps(self) -> tuple[float, float, float, float, float]:
        """(inner edge, outer edge, gain below, gain between, gain beyond), edges in the user's unit."""
        raise TypeError(f"{type(self).__name__} does not define _steps()")

    def _measure(self) -> tuple[Unit, Metric]:
        raise TypeError(f"{type(self).__name__} does not define _measure()")

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        inner, outer, below, between, beyond = self._steps()
        unit, metric = self._measure()
        unit_y, unit_x = self._units(shape, metric)
        edge0, edge1 = (self._edge(edge, shape, unit, metric) for edge in (inner, outer))
        return MaskParams("steps", *matrix_shape(shape), unit_y, unit_x, edge0, edge1, below, between, beyond)

    def _profile(self, radius: Gains, params: MaskParams) -> Gains:
        outer = np.where(radius < params.edge1, params.gain1, params.gain2)
        return np.where(radius < params.edge0, params.gain0, outer)

    def box(self, shape: tuple[int, ...]) -> Box:
        params = self.params(shape)
        return Box(params.gain2, (_band(params.edge1, params.unit_y), _band(params.edge1, params.unit_x)))


@dataclass(frozen=True)
class _SingleCutoff(_Steps):
    cutoff: float
    unit: Unit = field(default="fraction", kw_only=True)
    metric: Metric = field(default="bins", kw_only=True)

    _gains: ClassVar[tuple[float, float]]

    def __post_init__(self) -> None:
        _set_number(self, "cutoff", least=0)
        _check_measure(self.unit, self.metric)

    def _steps(self) -> tuple[float, float, float, float, float]:
        below, beyond = self._gains
        return self.cutoff, self.cutoff, below, beyond, beyond

    def _measure(self) -> tuple[Unit, Metric]:
        return self.unit, self.metric


def _check_measure(unit: str, metric: str) -> None:
    if unit not in ("fraction", "bins"):
        raise ArgumentError(f"unit must be 'fraction' or 'bins', got {unit!r}")
    if metric not in ("bins", "normalized"):
        raise ArgumentError(f"metric must be 'bins' or 'normalized', got {metric!r}")
    if metric == "normalized" and unit == "bins":
        raise ArgumentError(
            "unit='bins' cannot be combined with metric='normalized' (its radius is in cycles per sample)"
        )


@dataclass(frozen=True)
class HighPass(_SingleCutoff):
    """The paper's ideal high-pass: keep bins with sqrt(ky^2 + kx^2) >= D0 (arXiv 2411.16815, section 4.1).

    ``cutoff`` is a fraction of min(H, W), so D0 = cutoff * min(H, W) DFT bins; with ``unit="bins"`` it is D0 itself;
    with ``metric="normalized"`` bins with sqrt((ky/H)^2 + (kx/W)^2) >= cutoff are kept, so that a rectangle is treated
    isotropically. A vector of n entries is filtered along its one axis with D0 = cutoff * n.
    """

    _gains: ClassVar[tuple[float, float]] = (0.0, 1.0)


@dataclass(frozen=True)
class LowPass(_SingleCutoff):
    """The complement of :class:`HighPass`: keep bins with a radius below the cutoff."""

    _gains: ClassVar[tuple[float, float]] = (1.0, 0.0)


@dataclass(frozen=True)
class _TwoCutoffs(_Steps):
    low: float
    high: float
    unit: Unit = field(default="fraction", kw_only=True)
    metric: Metric = field(default="bins", kw_only=True)

    _gains: ClassVar[tuple[float, float, float]]

    def __post_init__(self) -> None:
        _set_number(self, "low", least=0)
        _set_number(self, "high", least=0)
        if self.low > self.high:
            raise ArgumentError(f"low must not exceed high, got low={self.low!r} and high={self.high!r}")
        _check_measure(self.unit, self.metric)

    def _steps(self) -> tuple[float, float, float, float, float]:
        return self.low, self.high, *self._gains

    def _measure(self) -> tuple[Unit, Metric]:
        return self.unit, self.metric


@dataclass(frozen=True)
class BandPass(_TwoCutoffs):
    """Keep bins with low <= radius < high; units as in :class:`HighPass`."""

    _gains: ClassVar[tuple[float, float, float]] = (0.0, 1.0, 0.0)


@dataclass(frozen=True)
class BandStop(_TwoCutoffs):
    """Remove bins with low <= radius < high; units as in :class:`HighPass`."""

    _gains: ClassVar[tuple[float, float, float]] = (1.0, 0.0, 1.0)


@dataclass(frozen=True)
class BandGain(_Steps):
    """Gain ``low`` below the cutoff and ``high`` from it on, as FreSca and FAM Diffusion apply to 2-D latents."""

    cutoff: float
    low: float
    high: float
    unit: Unit = field(default="fraction", kw_only=True)
    metric: Metric = field(default="bins", kw_only=True)

    def __post_init__(self) -> None:
        _set_number(self, "cutoff", least=0)
        _set_number(self, "low")
        _set_number(self, "high")
        _check_measure(self.unit, self.metric)

    def _steps(self) -> tuple[float, float, float, float, float]:
        return self.cutoff, self.cutoff, self.low, self.high, self.high

    def _measure(self) -> tuple[Unit, Metric]:
        return self.unit, self.metric


@dataclass(frozen=True)
class Butterworth(_Radial):
    """Smooth high-pass without ringing: M = 1 / (1 + (D0 / r)^(2 order)), 0 at DC; units as in :class:`HighPass`."""

    cutoff: float
    order: float = 2
    unit: Unit = field(default="fraction", kw_only=True)
    metric: Metric = field(default="bins", kw_only=True)

    def __post_init__(self) -> None:
        _set_number(self, "cutoff", least=0)
        _set_number(self, "order", above=0)
        _check_measure(self.unit, self.metric)

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        edge = self._edge(self.cutoff, shape, self.unit, self.metric)
        return MaskParams(
            "butterworth", *matrix_shape(shape), *self._units(shape, self.metric), edge, order=float(self.order)
        )

    def _profile(self, radius: Gains, params: MaskParams) -> Gains:
        positive = np.where(radius == 0.0, 1.0, radius)
        with np.errstate(over="ignore"):  # far below the cutoff the power overflows and the gain is 0
            gains = 1.0 / (1.0 + (params.edge0 / positive) ** (2.0 * params.order))
        return np.where(radius == 0.0, 0.0, gains)


@dataclass(frozen=True)
class Gaussian(_Radial):
    """Smooth high-pass without ringing: M = 1 - exp(-r^2 / (2 D0^2)); units as in :class:`HighPass`."""

    cutoff: float
    unit: Unit = field(default="fraction", kw_only=True)
    metric: Metric = field(default="bins", kw_only=True)

    def __post_init__(self) -> None:
        _set_number(self, "cutoff", above=0)
        _check_measure(self.unit, self.metric)

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        edge = self._edge(self.cutoff, shape, self.unit, self.metric)
        return MaskParams("gaussian", *matrix_shape(shape), *self._units(shape, self.metric), edge)

    def _profile(self, radius: Gains, params: MaskParams) -> Gains:
        scaled = radius / params.edge0
        return -np.expm1(-0.5 * (scaled * scaled))

    def box(self, shape: tuple[int, ...]) -> Box:
        params = self.params(shape)
        edge = params.edge0 * math.sqrt(2 * math.log(1e13))  # beyond it 1 - M < 1e-13
        return Box(1.0, (_band(edge, params.unit_y), _band(edge, params.unit_x)))


@dataclass(frozen=True)
class Center(_ClosedForm):
    """Remove only the mean along ``axis``: -1 subtracts each row's mean (kx = 0), -2 each column's mean (ky = 0)."""

    axis: Literal[-1, -2] = -1

    def __post_init__(self) -> None:
        if self.axis not in (-1, -2):
            raise ArgumentError(f"axis must be -1 (row means) or -2 (column means), got {self.axis!r}")

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        if len(shape) == 1 and self.axis == -2:
            raise ArgumentError("axis=-2 needs a matrix, got a vector")
        return MaskParams("center", *matrix_shape(shape), axis=1 if self.axis == -1 else 0)

    def gain(self, ky: Gains, kx: Gains, shape: tuple[int, ...]) -> Gains:
        removed = (kx if self.params(shape).axis == 1 else ky) == 0.0
        return np.where(removed, 0.0, 1.0) * np.ones_like(ky + kx)

    def box(self, shape: tuple[int, ...]) -> Box:
        params = self.params(shape)
        return Box(1.0, (params.height, 1) if params.axis == 1 else (1, params.width))

    def _columns(self, params: MaskParams) -> Gains:
        if params.axis == 0:
            return np.full(params.width // 2 + 1, 0.0 if params.height == 1 else np.nan)
        gains = np.ones(params.width // 2 + 1)
        gains[0] = 0.0
        return gains


@dataclass(frozen=True)
class Official(_ClosedForm):
    """The mask of the authors' released code, quirks included (algorithm of ``fft2`` without ``fftshift``).

    With c = (H//2, W//2) in unshifted index space, dist in float32, r_lo = min(H, W)//10 and
    r_hi = ratio * min(H, W) (or max, as in the RoBERTa script): M = 1[dist <= r_hi] + 1[dist == r_lo]. It keeps a disc
    around Nyquist, and the few bins at exactly r_lo count twice.
    """

    ratio: float = 0.7
    relative_to: Literal["min", "max"] = field(default="min", kw_only=True)

    def __post_init__(self) -> None:
        _set_number(self, "ratio", least=0)
        if self.relative_to not in ("min", "max"):
            raise ArgumentError(f"relative_to must be 'min' or 'max', got {self.relative_to!r}")

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        sides = shape[-2:]
        reference = min(sides) if self.relative_to == "min" else max(sides)
        return MaskParams("official", *matrix_shape(shape), edge0=self.ratio * reference, edge1=float(min(sides) // 10))

    def gain(self, ky: Gains, kx: Gains, shape: tuple[int, ...]) -> Gains:
        params = self.params(shape)
        bin_y, bin_x = ky % params.height, kx % params.width
        mirror_y, mirror_x = -ky % params.height, -kx % params.width
        return 0.5 * (self._raw(bin_y, bin_x, params) + self._raw(mirror_y, mirror_x, params))

    def box(self, shape: tuple[int, ...]) -> Box | None:
        params = self.params(shape)
        if params.height % 2 or params.width % 2:  # no bin at Nyquist to centre a box on
            return None
        band = math.floor(max(params.edge0, params.edge1)) + 2  # float32 may round a distance down onto the edge
        bands = tuple(band if 2 * band - 1 < n else n for n in (params.height, params.width))
        return Box(0.0, (bands[0], bands[1]), (bands[0] == band, bands[1] == band))

    def _columns(self, params: MaskParams) -> Gains:
        x = np.arange(params.width // 2 + 1, dtype=np.float64)
        here, mirror = self._raw_column(x, params), self._raw_column(-x % params.width, params)
        return 0.5 * (here + mirror)  # NaN where either varies

    def _raw_column(self, bin_x: Gains, params: MaskParams) -> Gains:
        """Gain of each column if all its rows agree, else NaN: the disc by its two ends, the ring by its few bins."""
        centre = params.height // 2
        near = self._raw(np.full_like(bin_x, centre), bin_x, params)
        constant = near == self._raw(np.zeros_like(bin_x), bin_x, params)
        reach = np.sqrt(np.maximum(params.edge1**2 - (bin_x - params.width // 2) ** 2, 0.0))
        for step in (-1.0, 0.0, 1.0):
            row = np.clip(centre - np.round(reach) + step, 0.0, params.height - 1.0)
            constant &= self._raw(row, bin_x, params) == near
        return np.where(constant, near, np.nan)

    @staticmethod
    def _raw(bin_y: Gains, bin_x: Gains, params: MaskParams) -> Gains:
        dy, dx = bin_y - params.height // 2, bin_x - params.width // 2
        distance = np.sqrt((dy * dy + dx * dx).astype(np.float32))
        gains: Gains = (distance <= np.float32(params.edge0)).astype(np.float64)
        gains += distance == np.float32(params.edge1)
        return gains


class Custom(Response):
    """A user's own mask: an H x W array in stored order, or a callable ``mask(ky, kx, (H, W)) -> gains``.

    A callable gets signed frequencies in bins as broadcastable float64 arrays of shapes (h, 1) and (1, w). Arrays are
    copied, must be real and finite, and fit one shape only. Either is symmetrised. Callables compare by identity.
    """

    def __init__(self, mask: npt.ArrayLike | MaskFunction) -> None:
        if callable(mask):
            object.__setattr__(self, "_function", mask)
            object.__setattr__(self, "_array", None)
            object.__setattr__(self, "_key", (mask,))
            return
        try:
            array = np.array(mask)
            array = array.astype(np.float64, casting="same_kind" if array.dtype.kind == "c" else "unsafe")
        except (TypeError, ValueError):
            raise ArgumentError(f"mask must be a callable or an array of real numbers, got {mask!r}") from None
        if array.ndim not in (1, 2) or array.size == 0 or not np.isfinite(array).all():
            raise ArgumentError(f"mask must be a finite vector or matrix, got shape {array.shape}")
        array.flags.writeable = False
        object.__setattr__(self, "_function", None)
        object.__setattr__(self, "_array", array.reshape(matrix_shape(array.shape)))
        object.__setattr__(self, "_key", (array.shape, hashlib.blake2b(array.tobytes()).digest()))

    _function: MaskFunction | None
    _array: Gains | None
    _key: tuple[object, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def identity(self) -> str:
        """The mask's shape and hash, or the callable's name."""
        if self._function is not None:
            return (
                f"{self._function.__module__}.{getattr(self._function, '__qualname__', type(self._function).__name__)}"
            )
        shape, digest = self._key
        assert isinstance(digest, bytes)
        return f"array {shape}, blake2b {digest.hex()}"

    def __repr__(self) -> str:
        inner = self._function if self._array is None else self._array.tolist()
        return f"Custom({inner!r})"

    def gain(self, ky: Gains, kx: Gains, shape: tuple[int, ...]) -> Gains:
        return 0.5 * (self._raw(ky, kx, matrix_shape(shape)) + self._raw(-ky, -kx, matrix_shape(shape)))

    def _raw(self, ky: Gains, kx: Gains, shape: tuple[int, int]) -> Gains:
        height, width = shape
        if self._array is not None:
            if self._array.shape != shape:
                raise ArgumentError(f"mask has shape {self._array.shape} but the tensor has {shape}")
            gains: Gains = self._array[(ky % height).astype(np.intp), (kx % width).astype(np.intp)]
            return gains
        assert self._function is not None
        # The mirror image of a Nyquist bin is itself: hand the callable the stored sign.
        ky = np.where(2 * ky == -height, -ky, ky)
        kx = np.where(2 * kx == -width, -kx, kx)
        called = np.asarray(self._function(ky, kx, shape))
        if called.dtype.kind not in "fiub" or not np.isfinite(called).all():
            raise ArgumentError(f"the mask callable must return finite real numbers, got {called.dtype} {called!r}")
        called = called.astype(np.float64)
        try:
            return np.broadcast_to(called, np.broadcast_shapes(ky.shape, kx.shape))
        except ValueError:
            raise ArgumentError(f"mask callable returned shape {called.shape} for {ky.shape} x {kx.shape}") from None


@dataclass(frozen=True)
class _Transposed(Response):
    """The response that a transposed matrix needs: M'(l, k) = M(k, l)."""

    inner: Response

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        p = self.inner.params(shape[::-1])
        return replace(p, height=p.width, width=p.height, unit_y=p.unit_x, unit_x=p.unit_y, axis=1 - p.axis)

    def gain(self, ky: Gains, kx: Gains, shape: tuple[int, ...]) -> Gains:
        gains: Gains = self.inner.gain(kx.T, ky.T, shape[::-1]).T
        return gains

    def box(self, shape: tuple[int, ...]) -> Box | None:
        box = self.inner.box(shape[::-1])
        return None if box is None else Box(box.background, box.bands[::-1], box.nyquist[::-1])

    def column_gains(self, shape: tuple[int, ...]) -> Gains:
        if isinstance(self.inner, _ClosedForm):
            return self.inner._columns(self.params(shape))
        return super().column_gains(shape)


def has_closed_form(response: Response) -> bool:
    """Whether :meth:`Response.params` can say it all; other masks travel as arrays."""
    return isinstance(response.inner if isinstance(response, _Transposed) else response, _ClosedForm)


def holds_array(response: Response) -> bool:
    """Whether a response keeps a mask of its own, as large as half a matrix."""
    inner = response.inner if isinstance(response, _Transposed) else response
    return isinstance(inner, Custom) and inner._array is not None


def transposed(response: Response) -> Response:
    """The response for which filtering a transposed matrix is the transposed result of ``response``."""
    return response.inner if isinstance(response, _Transposed) else _Transposed(response)


RESPONSES: dict[str, type[Response]] = {
    cls.__name__: cls
    for cls in (HighPass, LowPass, BandPass, BandStop, Butterworth, Gaussian, BandGain, Center, Official)
}


def to_config(response: Response) -> dict[str, object]:
    """A response as plain data, ``{"type": "HighPass", "cutoff": 0.4, ...}``; custom masks cannot be written down."""
    name = type(response).__name__
    if name not in RESPONSES:
        raise ArgumentError(f"response {name} cannot be serialised; use one of {', '.join(RESPONSES)}")
    return {"type": name, **{f.name: getattr(response, f.name) for f in fields(response)}}


def to_record(response: Response) -> dict[str, object]:
    """For manifests: :func:`to_config`, or what identifies a response that cannot be written down."""
    if type(response).__name__ in RESPONSES:
        return to_config(response)
    return {
        "type": type(response).__name__,
        "mask": response.identity if isinstance(response, Custom) else repr(response),
    }


def from_config(config: object) -> Response:
    """The inverse of :func:`to_config`."""
    kind = config.get("type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(kind, str) or kind not in RESPONSES:
        raise ArgumentError(f"response must be a mapping with type one of {', '.join(RESPONSES)}, got {config!r}")
    options = {key: value for key, value in config.items() if key != "type"}
    cls = RESPONSES[kind]
    known = [f.name for f in fields(cls)]
    for key in options:
        if key not in known:
            raise ArgumentError(f"response {kind} has no option {key!r}; it takes {', '.join(known)}")
    try:
        return cls(**options)
    except TypeError as error:
        raise ArgumentError(f"response {kind}: {error}") from None
