"""How the matrices of a tensor are handed to a backend, which needs contiguous rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..responses import Response, transposed


@dataclass(frozen=True)
class Layout:
    """What is done to the matrices of a tensor before they are filtered, and after."""

    flipped: bool = False  #: their columns are contiguous: their transposes are filtered
    copied: bool = False  #: neither rows nor columns are: one matrix at a time is copied out and back


ROWS = Layout()


def lay_out(
    response: Response, shape: tuple[int, ...], strides: Sequence[int]
) -> tuple[Response, tuple[int, ...], Layout]:
    """The layout of a tensor, and the response and shape to filter with in that layout."""
    if strides[-1] == 1 or shape[-1] == 1:
        return response, shape, ROWS
    if len(shape) > 1 and strides[-2] == 1:
        return transposed(response), (*shape[:-2], shape[-1], shape[-2]), Layout(flipped=True)
    return response, shape, Layout(copied=True)
