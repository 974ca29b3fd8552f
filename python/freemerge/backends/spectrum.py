"""Where the torch backend keeps a matrix's half spectrum between its row transforms and its column transforms."""

from __future__ import annotations

from typing import Protocol

import torch

_TURNED_ROWS = 256  # rows of a spectrum turned at a time, which fit the cache
_PACKED_ROWS = 1024  # the same of a few packed columns, which take more steps


class Spectrum(Protocol):
    """The half spectrum of one H x W matrix at a time: written and read by rows, then by columns.

    Columns are counted among those that are kept; a panel is a complex (columns, H) tensor, as FFTs and products along
    contiguous columns are faster.
    """

    at_once: bool  #: whether the rows of a matrix are put all at once

    def open(self, x: torch.Tensor) -> None:
        """Start on another matrix."""

    def put(self, row: int, half: torch.Tensor) -> None:
        """Keep the real FFT of rows from ``row`` on, (rows, W // 2 + 1)."""

    def get(self, row: int, count: int) -> torch.Tensor:
        """The half spectrum of rows [row, row + count); columns that are not kept are 0."""
        ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """A panel of its own."""
        ...

    def write(self, start: int, stop: int, panel: torch.Tensor) -> None: ...

    def scale(self, start: int, stop: int, gain: float) -> None: ...


def _turned(rows: torch.Tensor) -> torch.Tensor:
    """(H, columns) as contiguous (columns, H)."""
    panel = torch.empty(rows.shape[::-1], dtype=rows.dtype, device=rows.device)
    for row in range(0, rows.shape[0], _TURNED_ROWS):
        panel[:, row : row + _TURNED_ROWS] = rows[row : row + _TURNED_ROWS].t()
    return panel


class _Columns:
    """Columns as a matrix has them, in memory beside the filtered one."""

    _columns: torch.Tensor

    def open(self, x: torch.Tensor) -> None:
        pass

    def read(self, start: int, stop: int) -> torch.Tensor:
        return _turned(self._columns[:, start:stop])

    def write(self, start: int, stop: int, panel: torch.Tensor) -> None:
        self._columns[:, start:stop] = panel.t()

    def scale(self, start: int, stop: int, gain: float) -> None:
        self._columns[:, start:stop] *= gain


class WholeSpectrum(_Columns):
    """All columns, as the real FFT of all rows leaves them."""

    at_once = True

    def put(self, row: int, half: torch.Tensor) -> None:
        self._columns = half

    def get(self, row: int, count: int) -> torch.Tensor:
        return self._columns[row : row + count]


class PrunedSpectrum(_Columns):
    """Some ranges of columns, in memory of their own."""

    at_once = False

    def __init__(self, shape: tuple[int, int], runs: list[tuple[int, int]], dtype: torch.dtype, device: str) -> None:
        self._runs, self._bins = runs, shape[1] // 2 + 1
        self._columns = torch.empty(shape[0], sum(stop - start for start, stop in runs), dtype=dtype, device=device)

    def put(self, row: int, half: torch.Tensor) -> None:
        position = 0
        for start, stop in self._runs:
            self._columns[row : row + half.shape[0], position : position + stop - start] = half[:, start:stop]
            position += stop - start

    def get(self, row: int, count: int) -> torch.Tensor:
        half = self._columns.new_zeros(count, self._bins)
        position = 0
        for start, stop in self._runs:
            half[:, start:stop] = self._columns[row : row + count, position : position + stop - start]
            position += stop - start
        return half


class PackedSpectrum:
    """All columns, in the matrix's own memory: each row holds [DC, (Nyquist if W is even), re 1, im 1, re 2, ...]."""

    at_once = False

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        width = shape[1]
        self._dtype, self._bins = dtype, width // 2 + 1
        self._nyquist = width // 2 if width % 2 == 0 else 0
        self._first = 2 if self._nyquist else 1  # where the interior bins start
        self._interior = (width - 1) // 2

    def open(self, x: torch.Tensor) -> None:
        self._x = x

    def put(self, row: int, half: torch.Tensor) -> None:
        count = half.shape[0]
        target, parts = self._x[row : row + count], torch.view_as_real(half)
        target[:, 0] = parts[:, 0, 0]
        if self._nyquist:
            target[:, 1] = parts[:, self._nyquist, 0]
        target[:, self._first :] = parts[:, 1 : 1 + self._interior].view(count, 2 * self._interior)

    def get(self, row: int, count: int) -> torch.Tensor:
        half = torch.empty(count, self._bins, dtype=self._dtype, device=self._x.device)
        source, parts = self._x[row : row + count], torch.view_as_real(half)
        parts[:, 0, 0] = source[:, 0]
        parts[:, 0, 1] = 0.0
        if self._nyquist:
            parts[:, self._nyquist, 0] = source[:, 1]
            parts[:, self._nyquist, 1] = 0.0
        parts[:, 1 : 1 + self._interior].view(count, 2 * self._interior).copy_(source[:, self._first :])
        return half

    def read(self, start: int, stop: int) -> torch.Tensor:
        height = self._x.shape[0]
        panel = torch.empty(stop - start, height, dtype=self._dtype, device=self._x.device)
        for row in range(0, height, _PACKED_ROWS):
            source = self._x[row : row + _PACKED_ROWS]
            block = torch.empty(source.shape[0], stop - start, dtype=self._dtype, device=self._x.device)
            parts = torch.view_as_real(block)
            for position, column in self._real_columns(start, stop):
                parts[:, column, 0] = source[:, position]
                parts[:, column, 1] = 0.0
            first, last = max(start, 1), min(stop, self._interior + 1)
            if first < last:
                parts[:, first - start : last - start] = self._inner(source, first, last)
            panel[:, row : row + _PACKED_ROWS] = block.t()
        return panel

    def write(self, start: int, stop: int, panel: torch.Tensor) -> None:
        for row in range(0, self._x.shape[0], _PACKED_ROWS):
            target = self._x[row : row + _PACKED_ROWS]
            parts = torch.view_as_real(panel[:, row : row + _PACKED_ROWS].t().contiguous())
            for position, column in self._real_columns(start, stop):
                target[:, position] = parts[:, column, 0]
            first, last = max(start, 1), min(stop, self._interior + 1)
            if first < last:
                self._inner(target, first, last).copy_(parts[:, first - start : last - start])

    def scale(self, start: int, stop: int, gain: float) -> None:
        for position, _ in self._real_columns(start, stop):
            self._x[:, position] *= gain
        first, last = max(start, 1), min(stop, self._interior + 1)
        if first < last:
            self._inner(self._x, first, last).mul_(gain)

    def _real_columns(self, start: int, stop: int) -> list[tuple[int, int]]:
        """DC and Nyquist if they are among the columns: (position in the row, index in the panel)."""
        real = [(0, 0)] if start == 0 else []
        if self._nyquist and stop == self._nyquist + 1:
            real.append((1, self._nyquist - start))
        return real

    def _inner(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        floats = rows[:, self._first + 2 * (start - 1) : self._first + 2 * (stop - 1)]
        return floats.view(floats.shape[0], stop - start, 2)
