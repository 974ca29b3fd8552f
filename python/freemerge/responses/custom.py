"""Masks that the user brings, as an array or as a function."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from .base import LARGEST_GAIN, Gains, Response, matrix_shape

MaskFunction = Callable[[Gains, Gains, tuple[int, int]], npt.ArrayLike]

_NO_ARRAY = (RuntimeError, TypeError, ValueError)  # what NumPy raises, and torch for tensors that need grad


class Custom(Response):
    """A user's own mask: an H x W array in stored order, or a callable ``mask(ky, kx, (H, W)) -> gains``.

    A callable gets signed frequencies in bins as broadcastable float64 arrays of shapes (h, 1) and (1, w). Arrays are
    copied, must be real and finite, also in float32, and fit one shape only. Either is symmetrised. Callables compare
    by identity, and are asked once for a shape: one that is to give other gains later has to be another one.
    """

    def __init__(self, mask: npt.ArrayLike | MaskFunction) -> None:
        if callable(mask):
            object.__setattr__(self, "_function", mask)
            object.__setattr__(self, "_array", None)
            object.__setattr__(self, "_key", ())
            return
        try:
            array = _unmasked(mask)
            array = array.astype(np.float64, casting="same_kind" if array.dtype.kind == "c" else "unsafe")  # a copy
        except _NO_ARRAY:
            raise ArgumentError(f"mask must be a callable or an array of real numbers, got {mask!r}") from None
        if array.ndim not in (1, 2) or array.size == 0 or not _fit(array):
            raise ArgumentError(f"mask must be a finite vector or matrix in float32, too, got shape {array.shape}")
        array.flags.writeable = False
        object.__setattr__(self, "_function", None)
        object.__setattr__(self, "_array", array.reshape(matrix_shape(array.shape)))
        object.__setattr__(self, "_key", (array.shape, hashlib.blake2b(array.tobytes()).digest()))

    _function: MaskFunction | None
    _array: Gains | None
    _key: tuple[object, ...]

    def __eq__(self, other: object) -> bool:
        # A bound method equals one that was made before, although its object may have changed.
        return isinstance(other, Custom) and self._function is other._function and self._key == other._key

    def __hash__(self) -> int:
        return hash((id(self._function), self._key))

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
        return f"Custom({self.identity if self._function is None else repr(self._function)})"

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
        returned = self._function(ky, kx, shape)
        try:
            called = _unmasked(returned)
        except _NO_ARRAY:
            raise ArgumentError(f"the mask callable must return finite real numbers, got {returned!r}") from None
        if called.dtype.kind not in "fiub" or not _fit(called):
            raise ArgumentError(
                f"the mask callable must return finite real numbers, in float32, too, got {called.dtype} {called!r}"
            )
        called = called.astype(np.float64)
        try:
            return np.broadcast_to(called, np.broadcast_shapes(ky.shape, kx.shape))
        except ValueError:
            raise ArgumentError(f"mask callable returned shape {called.shape} for {ky.shape} x {kx.shape}") from None


def _unmasked(values: object) -> npt.NDArray[np.generic]:
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError("its own mask would be ignored")
    return np.asarray(values)


def _fit(gains: npt.NDArray[np.generic]) -> bool:
    """Whether all are finite, in float32 too."""
    return bool((np.abs(gains) <= np.float64(LARGEST_GAIN)).all())  # a Python float would be rounded to float16, to inf
