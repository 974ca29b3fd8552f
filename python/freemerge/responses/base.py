"""What every response has: its numbers for one shape, its mask, and the facts that the planner asks for."""

from __future__ import annotations

import inspect
import math
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arguments import finite_number
from ..errors import ArgumentError

Gains = npt.NDArray[np.float64]

LARGEST_GAIN = float(np.finfo(np.float32).max)  # that kernels can multiply by

_BLOCK_ELEMENTS = 1 << 22  # bounds the memory of anything that walks a whole mask


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
    """Where a mask differs from ``background`` by more than ``tail``: offsets ``|k| < band`` from DC, or from Nyquist
    (n / 2, also where that is between two bins), along each axis."""

    background: float
    bands: tuple[int, int]
    nyquist: tuple[bool, bool] = (False, False)
    tail: float = 0.0


def signed_frequencies(n: int) -> Gains:
    """Signed frequency of each stored bin of an n-point DFT, in bins."""
    k = np.arange(n, dtype=np.float64)
    return np.where(k <= n // 2, k, k - n)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(H, W) of a filtered shape; a vector of n entries is the 1 x n matrix. ArgumentError for what is no shape."""
    try:
        sides = [operator.index(side) for side in shape]
    except TypeError:
        sides = []
    if not sides or min(sides) < 1:
        raise ArgumentError(f"shape must be one or more whole numbers from 1 on, got {shape!r}")
    height, width = (1, *sides)[-2:]
    return height, width


def column_weights(width: int) -> Gains:
    """How many of the W columns each half-spectrum column stands for: itself and, if it has one, its mirror image."""
    weights = np.full(width // 2 + 1, 2.0)
    weights[0] = 1.0
    if width % 2 == 0:
        weights[-1] = 1.0
    return weights


def removed(gains: Gains) -> Gains:
    """The share of each bin that its gain removes, ``1 - min(|M_s|, 1)``."""
    return 1.0 - np.minimum(np.abs(gains), 1.0)


def blocks(rows: int, columns: int) -> list[slice]:
    """The rows of a large array in blocks of bounded memory."""
    step = max(1, _BLOCK_ELEMENTS // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def set_number(
    response: Response, name: str, *, least: float = -math.inf, above: float = -math.inf, size: float = math.inf
) -> None:
    """Check a field of a response, at most ``size`` on either side of zero, and make it a Python float."""
    number = finite_number(getattr(response, name))
    if number is None or number < least or number <= above or abs(number) > size:
        bounds = ((" >= ", least), (" > ", above), (" of a size up to ", size))
        bound = "".join(f"{text}{limit:g}" for text, limit in bounds if math.isfinite(limit))
        raise ArgumentError(f"{name} must be a finite number{bound}, got {getattr(response, name)!r}")
    object.__setattr__(response, name, number)


@dataclass(frozen=True, eq=False)  # else all of a subclass that is no dataclass would be equal, having no fields
class Response:
    """Base class of all frequency responses: frozen, hashable and comparable. Their repr is code, but for Custom.

    Subclasses define :meth:`params` and :meth:`gain`; the rest follows. ``shape`` is (n,) for a vector or (H, W).
    What was made for a response serves equal ones, too: a subclass is a frozen dataclass, whose fields are compared,
    or defines ``__eq__`` and ``__hash__``; else each of its objects equals itself only.
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
        """Share of the spectrum this response removes at ``shape``: the mean over all bins of ``1 - min(|M_s|, 1)``."""
        height, width = matrix_shape(shape)
        weights = column_weights(width)
        total = sum(
            float(removed(self.half_mask(shape, rows)).sum(axis=0) @ weights) for rows in blocks(height, width // 2 + 1)
        )
        return total / (height * width)

    def box(self, shape: tuple[int, ...], tolerance: float) -> Box | None:
        """The small box of frequencies outside of which the mask is constant, if the response knows one.

        A mask that approaches a constant may differ from it by ``tolerance`` there.
        """
        return None

    def column_gains(self, shape: tuple[int, ...]) -> Gains:
        """For each half-spectrum column l, its gain if that is the same for every row frequency, else NaN."""
        height, width = matrix_shape(shape)
        low = np.full(width // 2 + 1, np.inf)
        high = np.full(width // 2 + 1, -np.inf)
        for rows in blocks(height, width // 2 + 1):
            block = self.half_mask(shape, rows)
            np.minimum(low, block.min(axis=0), out=low)
            np.maximum(high, block.max(axis=0), out=high)
        return np.where(low == high, low, np.nan)

    def opposite(self, background: float, shape: tuple[int, ...]) -> float:
        """How far gains go to the other side of zero than ``background``."""
        width = matrix_shape(shape)[1] // 2 + 1
        masks = (self.half_mask(shape, rows) for rows in blocks(matrix_shape(shape)[0], width))
        return max(0.0, *(float((mask if background < 0 else -mask).max()) for mask in masks))


RESPONSES: dict[str, type[Response]] = {}  #: responses that numbers describe, by the names of their classes


class ClosedForm(Response, ABC):
    """A response that its :class:`MaskParams` describe: a kind in csrc/common/mask.h has the same gains.

    Every concrete subclass with a public name is registered in RESPONSES.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.__name__.startswith("_") and not inspect.isabstract(cls):
            RESPONSES[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Write the response down for graphs of torch: torch.compile keeps text, but may make a number a variable."""
        text = type(self).__name__
        for name in self.__dataclass_fields__:
            if not name.startswith("_"):  # of the class
                text = f"{text}|{name}={getattr(self, name)!r}"
        object.__setattr__(self, "_text", text)

    _text: str  #: as :func:`freemerge.ops.response_of` reads it

    @abstractmethod
    def params(self, shape: tuple[int, ...]) -> MaskParams:
        """The response resolved for one shape, as the numbers the native kernels take."""

    @abstractmethod
    def gain(self, ky: Gains, kx: Gains, shape: tuple[int, ...]) -> Gains:
        """Symmetrised gain M_s at signed frequencies ``ky`` and ``kx`` (broadcast against each other)."""

    @abstractmethod
    def _columns(self, params: MaskParams) -> Gains:
        """:meth:`column_gains` from the numbers alone, without a look at the mask."""

    def column_gains(self, shape: tuple[int, ...]) -> Gains:
        """For each half-spectrum column l, its gain if that is the same for every row frequency, else NaN."""
        return self._columns(self.params(shape))

    def opposite(self, background: float, shape: tuple[int, ...]) -> float:
        """How far gains go to the other side of zero than ``background``: no kind has any but those it is given."""
        params, sign = self.params(shape), 1.0 if background < 0 else -1.0
        return max(0.0, *(sign * gain for gain in (params.gain0, params.gain1, params.gain2)))
