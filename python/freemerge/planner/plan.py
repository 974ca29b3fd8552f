"""What a backend is told to do: a frozen value that :mod:`.forms` makes and that prints well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from ..cache import ByResponse
from ..dense import dtype_name
from ..lazy import cached_property
from ..responses import Gains, Response, matrix_shape, transposed
from .layout import ROWS, Layout
from .tiles import Tiles

Form = Literal["identity", "scale", "mean", "decimated", "pruned", "full"]


@dataclass(frozen=True)
class Decimation:
    """Reduction of one axis of n samples to ``cells`` coarse cells, which carry the offsets ``|k| < band``.

    ``taps`` is the width of the Kaiser-Bessel window in cells; ``taps == 0`` leaves an axis of n = ``cells`` samples
    whole. ``nyquist`` centres the band on Nyquist instead of DC: between two bins where n is odd.
    """

    cells: int
    taps: int
    band: int
    nyquist: bool = False

    def __str__(self) -> str:
        window = f"{self.taps} taps" if self.taps else "whole"
        return f"{self.cells} cells, {window}, |k| < {self.band}{' from Nyquist' if self.nyquist else ''}"


def column_gains(response: Response, shape: tuple[int, ...], transpose: bool) -> Gains:
    """:meth:`Response.column_gains` of a response, or of the transposed one; kept for the plans that share them."""

    def make() -> Gains:
        gains = transposed(response).column_gains(shape[::-1]) if transpose else response.column_gains(shape)
        gains.flags.writeable = False
        return gains

    return _COLUMN_GAINS.get((response, shape, transpose), make)


_COLUMN_GAINS: ByResponse[Gains] = ByResponse(64)


@dataclass(frozen=True)
class Plan:
    """How one matrix is filtered in place, y = scale * Re(ifft2(M * fft2(x))); the twin of csrc/common/plan.h.

    ========= ==========================================================================================
    form      meaning
    ========= ==========================================================================================
    identity  M is 1 everywhere: y = x
    scale     M is one constant: y = background * x
    mean      of a row, M is one constant but at DC: y = background * x + (M(0) - background) * mean(x)
    decimated y = background * x + z, where the spectrum of z lies in a box: windows spread x on a coarse
              grid, a small FFT filters it, and the transposed windows interpolate z
    pruned    y = background * x + z, where z lives on the spectrum's columns whose gain is not background
    full      row FFTs, column FFTs, mask, and back
    ========= ==========================================================================================

    ``shape`` and ``response`` are those in this ``layout``. ``shape`` is (n,) for a
    vector, which filters as a 1 x n matrix but takes its cutoff from n. ``transposed`` (pruned, full) takes real FFTs
    along the columns of x instead of its rows; ``packed`` (full) keeps the spectrum in x's own memory; ``fused`` (full)
    transforms a column of the spectrum, masks it and transforms it back in one kernel; with ``tiles`` kernels of the
    backend transform rows too, three in all, or filter the coarse grid (decimated); ``library`` (full) makes the
    transforms, if not the backend itself; ``centers`` takes the mean of x out where it is dominant, and adds M(0, 0)
    times it to y. ``error_bound`` bounds ||y - exact|| / (max|M| ||x||) before y is rounded to ``dtype``, for an x
    whose energy is not all in a few frequencies: those that alias most into a decimated band have a few times the mean.
    ``bytes_moved`` counts the reads and writes of x itself.
    """

    backend: str
    form: Form
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    response: Response
    background: float
    reason: str = field(compare=False)
    transposed: bool = False
    packed: bool = False
    library: str = ""
    centers: bool = False
    rows: Decimation | None = None
    columns: Decimation | None = None
    fused: bool = False
    tiles: Tiles | None = None
    # What follows from the rest, or is done before and after it, makes no other plan.
    layout: Layout = field(default=ROWS, compare=False)
    workspace_bytes: int = field(default=0, compare=False)
    bytes_moved: int = field(default=0, compare=False)
    error_bound: float = field(default=0.0, compare=False)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Tables are cached by plan: a small filter must not pay for hashing every field each time.
        return hash(
            (self.backend, self.form, self.shape, self.dtype, self.device, self.response, self.rows, self.columns)
        )

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}  # it differs by process

    @property
    def column_gains(self) -> Gains:
        """The class of each column of the half spectrum (row, if transposed): its gain if it has one, else NaN."""
        return column_gains(self.response, self.shape, self.transposed)

    @property
    def matrix(self) -> tuple[int, int]:
        """(H, W)."""
        return matrix_shape(self.shape)

    def because(self, refusals: Sequence[str]) -> Plan:
        """This plan, telling also what was passed over before it and why."""
        return replace(self, reason="; ".join([self.reason, *refusals])) if refusals else self

    def __str__(self) -> str:
        shape, response = self.shape, self.response
        if self.layout.flipped:
            shape, response = shape[::-1], transposed(response)
        lines = [
            f"{self.form} on backend {self.backend}",
            f"  input      {' x '.join(map(str, shape))} {dtype_name(self.dtype)} on {self.device}",
            f"  response   {response!r}, background gain {self.background:g}",
        ]
        if self.layout.flipped:
            lines.append("  layout     columns are contiguous: the transpose is filtered")
        if self.layout.copied:
            lines.append("  layout     not contiguous: each matrix is copied out and back")
        if self.rows is not None and self.columns is not None:
            lines += [f"  rows       {self.rows}", f"  columns    {self.columns}"]
        if self.transposed:
            lines.append("  axes       transposed: real transforms run along the columns")
        if self.form in ("pruned", "full"):
            gains = self.column_gains
            varying, other = int(np.isnan(gains).sum()), int((gains != self.background).sum())
            lines.append(f"  columns    {gains.size}: gain varies in {varying}, is not the background in {other}")
        if self.fused:
            lines.append("  fused      one kernel transforms and masks a column, and transforms it back")
        if self.tiles is not None:
            what = "kernels   " if self.form == "full" else "grid      "
            lines.append(f"  {what} rows to spectra, columns, and back: {self.tiles}")
        if self.packed:
            lines.append("  spectrum   packed: in the memory of the input")
        if self.library:
            lines.append(f"  FFTs       by {self.library}")
        if self.centers:
            lines.append("  mean       taken out first where it is dominant")
        lines += [
            f"  traffic    {self.bytes_moved / 1e6:.2f} MB of input read and written",
            f"  workspace  {self.workspace_bytes / 1e6:.2f} MB",
            f"  error      <= {self.error_bound:.1e} relative to the input",
            f"  because    {self.reason}",
        ]
        return "\n".join(lines)
