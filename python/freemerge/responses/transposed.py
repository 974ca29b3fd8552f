"""The response that filters a transposed matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .base import Box, ClosedForm, Gains, MaskParams, Response
from .custom import Custom


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

    def removed_fraction(self, shape: tuple[int, ...]) -> float:
        return self.inner.removed_fraction(shape[::-1])

    def box(self, shape: tuple[int, ...], tolerance: float) -> Box | None:
        box = self.inner.box(shape[::-1], tolerance)
        return None if box is None else replace(box, bands=box.bands[::-1], nyquist=box.nyquist[::-1])

    def opposite(self, background: float, shape: tuple[int, ...]) -> float:
        return self.inner.opposite(background, shape[::-1])

    def column_gains(self, shape: tuple[int, ...]) -> Gains:
        if isinstance(self.inner, ClosedForm):
            return self.inner._columns(self.params(shape))
        return super().column_gains(shape)


def transposed(response: Response) -> Response:
    """The response for which filtering a transposed matrix is the transposed result of ``response``."""
    return response.inner if isinstance(response, _Transposed) else _Transposed(response)


def has_closed_form(response: Response) -> bool:
    """Whether :meth:`Response.params` describes the mask; other masks travel as arrays."""
    return isinstance(response.inner if isinstance(response, _Transposed) else response, ClosedForm)


def holds_array(response: Response) -> bool:
    """Whether a response holds its mask as an array."""
    inner = response.inner if isinstance(response, _Transposed) else response
    return isinstance(inner, Custom) and inner._array is not None
