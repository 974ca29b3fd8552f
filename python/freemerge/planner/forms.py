"""The one planner: classifies a response on a shape, costs the forms that can do it, and writes them down as Plans.

Backends differ only by the numbers in their :class:`~.backend.Traits`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from ..responses import Box, Response, matrix_shape
from .costs import Traits
from .plan import Decimation, Plan, column_gains
from .windows import WindowError, window_error

#: Largest error_bound of a plan in fp32 (and 16-bit storage) and in fp64.
ERROR_LIMIT = {torch.float32: 5e-7, torch.float64: 1e-12}

_ROUNDING = {torch.float32: 6e-8, torch.float64: 1e-15}  # of one operation
_MIN_OVERSAMPLING = 1.5  # below it the window's transform at the band edge is so small that rounding is amplified
_OVERSAMPLINGS = (1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
_CACHED_GRID = 1 << 20  # elements of a coarse grid whose FFT runs in cache
_GRID_SHARE = 0.6  # a coarse grid larger than this share of the matrix is no decimation
_THIN_AXIS = 512  # samples at most
_THIN_PRODUCTS = 512  # multiply-adds per element at most
_FLAT_ELEMENTS = 1 << 17  # of the matrix that does both axes at once
_THIN_BLOCK = 1 << 19  # elements of a matrix that one round of products takes
_PRUNED_SHARE = 0.25  # a pruned spectrum larger than this share of the matrix is not worth its memory
_SMALL_BYTES = 16 << 20  # a spectrum that may always have memory of its own


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic of a storage dtype: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def candidates(
    response: Response,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    backend: str,
    traits: Traits,
    count: int = 1,
) -> list[Plan]:
    """Every plan that ``traits`` allow, cheapest first. Empty if the backend has no form for this response.

    ``count`` is the number of matrices of this shape in one tensor.
    """
    request = _Request(response, shape, dtype, device, backend, traits, count)
    constant = request.constant_gain()
    if constant is not None:
        form: tuple[str, ...] = ("identity", "scale") if constant == 1.0 else ("scale",)
        why = f"the gain is {constant:g} at every frequency"
        return [
            replace(request.plan, form=f, background=constant, reason=why, bytes_moved=moves * request.nbytes)
            for f, moves in (("identity", 0), ("scale", 2))
            if f in form and f in traits.forms
        ]
    costed = sorted(request.forms(), key=lambda pair: pair[0])
    if not costed:
        return []
    best = costed[0][0]
    summary = ", ".join(f"{plan.form}{' transposed' * plan.transposed} {cost / best:.1f}" for cost, plan in costed)
    return [replace(plan, reason=f"estimated relative cost: {summary}") for _, plan in costed]


@dataclass(frozen=True)
class _Request:
    response: Response
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    backend: str
    traits: Traits
    count: int

    @property
    def plan(self) -> Plan:
        """A plan with everything but the decisions."""
        return Plan(
            self.backend, "identity", self.shape, self.dtype, self.device, self.response, 1.0, "",
            error_bound=self.rounding,
        )  # fmt: skip

    @property
    def rounding(self) -> float:
        """Rounding error of a filter with exact transforms; it grows with the root of the number of FFT stages."""
        return _ROUNDING[compute_dtype(self.dtype)] * 1.2 * math.sqrt(1 + math.log2(math.prod(self.shape)))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def constant_gain(self) -> float | None:
        box = self.response.box(self.shape)
        if box is not None and 0 in box.bands:
            return box.background
        gains = column_gains(self.response, self.shape, False)
        return float(gains[0]) if bool((gains == gains[0]).all()) else None

    def forms(self) -> Iterator[tuple[float, Plan]]:
        box = self.response.box(self.shape)
        if box is not None and "decimated" in self.traits.forms:
            decimated = self._decimated(box)
            if decimated is not None:
                yield decimated
        if "thin" in self.traits.forms:
            thin = self._thin(box)
            if thin is not None:
                yield thin
        yield from self._by_columns(transpose=False)
        if self.traits.transposes and len(self.shape) > 1:
            yield from self._by_columns(transpose=True)

    def _decimated(self, box: Box) -> tuple[float, Plan] | None:
        """The cheapest pair of axis decimations within the error limit."""
        (height, width), (band_y, band_x), (nyquist_y, nyquist_x) = matrix_shape(self.shape), box.bands, box.nyquist
        costs, dtype = self.traits.costs, compute_dtype(self.dtype)
        best: tuple[float, Plan] | None = None
        for rows, row_error in self._axis(height, band_y, nyquist_y):
            for columns, column_error in self._column_axis(width, band_x, nyquist_x):
                if not (rows.taps or columns.taps):
                    continue  # the thin form does that
                if not columns.taps and self.traits.longest_sum and height > self.traits.longest_sum * rows.cells:
                    continue
                # Aliases into the band on the way down and out of it on the way up are orthogonal.
                error = math.sqrt(2) * math.hypot(row_error.alias, column_error.alias)
                error += 2 * _ROUNDING[dtype] * math.sqrt(row_error.amplification * column_error.amplification) ** 0.5
                if error > ERROR_LIMIT[dtype]:
                    continue
                grid = rows.cells * columns.cells
                if grid > _GRID_SHARE * height * width:
                    continue
                coarse = 2 * costs.coarse_fft * grid * math.log2(grid + 1) * (2 if grid > _CACHED_GRID else 1)
                cost = 3 * costs.move * height * width + coarse + costs.start / self.count
                down = self._fir(height, rows, costs.tap) * height
                across = self._fir(width, columns, costs.column_tap or costs.tap) * rows.cells
                cost += 2 * width * (down + across)
                cost += costs.call * 2 * ((rows.cells + columns.cells) / max(1, self.traits.extra_taps) + 4)
                if best is None or cost < best[0]:
                    best = cost, replace(
                        self.plan,
                        form="decimated",
                        background=box.background,
                        rows=rows,
                        columns=columns,
                        error_bound=error,
                        bytes_moved=self.nbytes * (3 if box.background else 2),
                        workspace_bytes=dtype.itemsize * (3 * grid + 128 * width),
                    )  # fmt: skip
        return best

    def _thin(self, box: Box | None) -> tuple[float, Plan] | None:
        """Dense products with the cosines and sines of the box, or of all frequencies, where the mask allows it."""
        (height, width), costs = matrix_shape(self.shape), self.traits.costs
        if box is None:
            box = Box(0.0, (height // 2 + 1, width // 2 + 1))
        rows, columns = (
            Decimation(min(n, 2 * band - 1), 0, min(band, n // 2 + 1), nyquist)
            for n, band, nyquist in zip((height, width), box.bands, box.nyquist, strict=True)
        )
        products = 2 * columns.cells * height * (width + rows.cells)
        flat = thin_is_flat((height, width), rows, columns)
        # Products add up in one long chain, whose rounding would grow with a long axis.
        if (max(height, width) > _THIN_AXIS and not flat) or products > _THIN_PRODUCTS * height * width:
            return None
        if not self._mirrored(rows, columns):
            return None
        rounds = max(1.0 / self.count, height * width / _THIN_BLOCK)
        # One matrix for both axes does less arithmetic than it reads: once for a batch, in fp64 on the way down.
        work = 1.5 * costs.move * height * width * rows.cells * columns.cells / self.count
        plan = replace(
            self.plan,
            form="thin",
            background=box.background,
            rows=rows,
            columns=columns,
            bytes_moved=self.nbytes * (3 if box.background else 2),
            error_bound=ERROR_LIMIT[compute_dtype(self.dtype)],
            workspace_bytes=compute_dtype(self.dtype).itemsize * columns.cells * (height + 2 * rows.cells),
        )
        cost = 3 * costs.move * height * width + (work if flat else costs.dense * products)
        return cost + 2.5 * costs.call * rounds, plan

    def _mirrored(self, rows: Decimation, columns: Decimation) -> bool:
        """Whether M(k, l) = M(k, -l) on the box, so that products of cosines and sines are eigenvectors."""
        height, width = matrix_shape(self.shape)
        ky, kx = thin_bins(height, rows)[:, None], thin_bins(width, columns)[None, :]
        gain, shape = self.response.gain, self.shape
        return bool(np.array_equal(gain(ky, kx, shape), gain(ky, -kx, shape)))

    def _axis(self, n: int, band: int, nyquist: bool) -> Iterator[tuple[Decimation, WindowError]]:
        """Ways to reduce one axis: for each oversampling, the two narrowest windows that are accurate enough."""
        traits, exact = self.traits, WindowError(0.0, 1.0)
        if 2 * band - 1 >= n:
            if traits.dense:
                yield Decimation(n, 0, n // 2 + 1), exact  # the whole axis: nothing to reduce
            return
        if traits.dense:
            yield Decimation(_smooth(2 * band - 1, 1), 0, band, nyquist), exact
        limit = ERROR_LIMIT[compute_dtype(self.dtype)] / 2
        for sigma in _OVERSAMPLINGS:
            cells = _smooth(math.ceil(sigma * (2 * band - 1)), traits.cells_multiple)
            accurate = 0
            for taps in traits.taps:
                d = Decimation(cells, taps, band, nyquist)
                if 2 * taps <= cells < n and (error := window_error(d)).alias < limit and accurate < 2:
                    accurate += 1
                    yield d, error

    def _column_axis(self, n: int, band: int, nyquist: bool) -> Iterator[tuple[Decimation, WindowError]]:
        yield from self._axis(n, band, nyquist)
        if self.traits.whole_columns and not self.traits.dense:
            yield Decimation(n, 0, n // 2 + 1), WindowError(0.0, 1.0)

    def _fir(self, n: int, d: Decimation, tap: float) -> float:
        """Cost per element of one pass along an axis."""
        if d.cells == n:
            return 0.0
        costs = self.traits.costs
        return tap * (d.taps + self.traits.extra_taps) if d.taps else costs.dense * d.cells

    def _by_columns(self, transpose: bool) -> Iterator[tuple[float, Plan]]:
        """The exact forms: real FFTs along one axis, complex ones along the other where the gain varies."""
        height, width = matrix_shape(self.shape)[::-1] if transpose else matrix_shape(self.shape)
        gains = column_gains(self.response, self.shape, transpose)
        background = background_gain(gains)
        varying = int(np.count_nonzero(gains != background))
        costs, traits, dtype = self.traits.costs, self.traits, compute_dtype(self.dtype)
        base = 2 * costs.row_fft * height * width * _fft_factor(width) * (costs.transposed if transpose else 1.0)
        steps = 2.5 if height == 1 else 6  # on a small matrix
        down = 2 * costs.column_fft * _fft_factor(height)
        size = dtype.itemsize * height * (width + 2)
        pruned_size = 2 * dtype.itemsize * height * varying
        blocks = dtype.itemsize * (3 * width + 6 * height) * 16
        packs = traits.packs is not None and self.dtype == dtype
        packed = packs and not transpose and size > (traits.packs or 0)
        common = replace(self.plan, background=background, transposed=transpose)
        large = packs and size > _SMALL_BYTES
        if "pruned" in traits.forms and varying < gains.size and (not large or pruned_size <= _PRUNED_SHARE * size):
            cost = 3 * costs.move * height * width + base + down * height * varying + steps * costs.call
            cost += 2 * costs.spectrum * height * varying
            work = pruned_size + blocks
            yield cost, replace(common, form="pruned", bytes_moved=3 * self.nbytes, workspace_bytes=work)
        if "full" in traits.forms and not (large and transpose):
            moves = 6 if packed and large else 2
            transformed = gains.size if traits.streams else int(np.count_nonzero(np.isnan(gains)))
            cost = base + down * height * transformed
            cost += moves * costs.move * height * width
            cost += 2 * costs.spectrum * height * int(np.count_nonzero(gains))  # NaN, a gain that varies, counts
            cost += steps * costs.call / (1 if packed else self.count)  # else a batch takes the steps together
            work = blocks if packed else size + blocks
            fused = not transpose and height <= traits.fused_length and largest_prime(height) <= traits.fused_prime
            full = replace(common, form="full", packed=packed, fused=fused)
            yield cost, replace(full, bytes_moved=moves * self.nbytes, workspace_bytes=work)


def background_gain(gains: np.ndarray) -> float:
    """The gain that most columns have throughout; 0 if every column varies."""
    constant = gains[~np.isnan(gains)]
    if not constant.size:
        return 0.0
    values, counts = np.unique(constant, return_counts=True)
    return float(values[np.argmax(counts)])


def thin_is_flat(shape: tuple[int, int], rows: Decimation, columns: Decimation) -> bool:
    """Whether the bases of both axes make one small matrix, for a product with the matrix as one vector."""
    return math.prod(shape) * rows.cells * columns.cells <= _FLAT_ELEMENTS


def thin_bins(n: int, d: Decimation) -> np.ndarray:
    """The frequencies of a thin axis without their signs: the first ones, or the last ones, of 0 .. n // 2."""
    offsets = np.arange(d.band, dtype=np.float64)
    return n // 2 - offsets if d.nyquist else offsets


@lru_cache(maxsize=4096)
def _smooth(minimum: int, multiple: int) -> int:
    """The smallest number >= minimum that is multiple * 2^a 3^b 5^c."""
    need = max(1, -(-minimum // multiple))
    power = 1 << (need - 1).bit_length()
    best = power
    five = 1
    while five < power:
        three = five
        while three < power:
            best = min(best, three << max(0, (-(-need // three) - 1).bit_length()))
            three *= 3
        five *= 5
    return multiple * best


def _fft_factor(n: int) -> float:
    """log2 n, with the price of lengths that have a large prime factor."""
    return math.log2(n + 1) * (1.0 if largest_prime(n) <= 13 else 3.0)


@lru_cache(maxsize=4096)
def largest_prime(n: int) -> int:
    """The largest prime factor of n; 1 for 1."""
    largest, divisor = 1, 2
    while divisor * divisor <= n:
        if n % divisor == 0:
            largest, n = divisor, n // divisor
        else:
            divisor += 1
    return max(largest, n)
