"""The one planner: classifies a response on a shape, costs the forms that can do it, and writes them down as Plans.

Backends differ only by the numbers in their :class:`~.costs.Traits`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from ..responses import Box, Response, matrix_shape
from .costs import Traits
from .lengths import largest_prime
from .plan import Decimation, Form, Plan, column_gains
from .tiles import tiles
from .windows import WindowError, half_bin, window_error

#: Largest error_bound of a plan in fp32 (and 16-bit storage) and in fp64.
ERROR_LIMIT = {torch.float32: 6.2e-7, torch.float64: 1e-12}

_ALIAS_LIMIT = {torch.float32: 2.5e-7, torch.float64: 5e-13}  # of one axis
_TAIL_LIMIT = {torch.float32: 5e-8, torch.float64: 1e-13}  # of what a smooth mask leaves outside a box

_ROUNDING = {torch.float32: 6e-8, torch.float64: 1e-15}  # of one operation
_CACHED_GRID = 1 << 20  # elements of a coarse grid whose FFT runs in cache
_GRID_SHARE = 0.6  # a coarse grid larger than this share of the matrix is no decimation
_PRUNED_SHARE = 0.25  # a pruned spectrum larger than this share of the matrix is not worth its memory
_SMALL_BYTES = 16 << 20  # a spectrum that may always have memory of its own
_DIRECT_PRIME = 13  # FFT libraries have no direct transform of a larger prime length, or a slow one


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
    box = response.box(shape, _TAIL_LIMIT[compute_dtype(dtype)])
    request = _Request(response, shape, dtype, device, backend, traits, count, box)
    constant = request.constant_gain()
    if constant is not None:
        why = f"the gain is {constant:g} at every frequency"
        moved: dict[Form, int] = {"identity": 0, "scale": 2} if constant == 1.0 else {"scale": 2}
        return [
            replace(request.plan, form=form, background=constant, reason=why, bytes_moved=moves * request.nbytes)
            for form, moves in moved.items()
            if form in traits.forms
        ]
    costed = sorted(request.forms(), key=lambda pair: pair[0])
    if not costed:
        return []
    best = costed[0][0]
    summary = ", ".join(f"{_name(plan)} {cost / best:.1f}" for cost, plan in costed)
    return [
        replace(
            plan,
            reason=f"estimated relative cost: {summary}",
            centers=dtype in traits.centers.get(plan.form, ()) and not plan.library,
        )
        for _, plan in costed
    ]


def first_plan(
    response: Response,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    backend: str,
    traits: Traits,
    count: int,
    supports: Callable[[Plan], str | None],
    *,
    forced: bool,
) -> Plan | str:
    """The cheapest plan that a backend supports, or why there is none, as the rest of a sentence after its name.

    With ``forced``, a backend that is slow on this shape is used all the same.
    """
    if dtype not in traits.dtypes:
        return f"has no kernels for {dtype}"
    if traits.slow_rows and not forced and matrix_shape(shape)[0] == 1:
        return f"is slow on a single row: {traits.slow_rows}"
    refusals: list[str] = []
    for plan in candidates(response, shape, dtype, device, backend, traits, count):
        refusal = supports(plan)
        if refusal is None:
            if traits.workspace is not None:
                plan = replace(plan, workspace_bytes=traits.workspace(plan))
            return plan.because(refusals)
        refusals.append(f"form {plan.form}: {refusal}")
    return "; ".join(refusals) or f"has no form for {response!r} at {' x '.join(map(str, shape))}"


@dataclass(frozen=True)
class _Request:
    response: Response
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    backend: str
    traits: Traits
    count: int
    box: Box | None

    @property
    def plan(self) -> Plan:
        """A plan with everything but the decisions."""
        return Plan(
            self.backend, "identity", self.shape, self.dtype, self.device, self.response, 1.0, "",
            error_bound=self.rounding,
        )  # fmt: skip

    @property
    def rounding(self) -> float:
        """Rounding error of a filter with exact transforms: the root of the number of FFT stages, gain, scale and y."""
        stages = sum(math.log2(n) * (1.0 if _direct(n) else self.traits.chirp_stages) for n in self.shape)
        return _ROUNDING[compute_dtype(self.dtype)] * 1.2 * math.sqrt(3 + stages)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def constant_gain(self) -> float | None:
        if self.box is not None and 0 in self.box.bands:
            return self.box.background
        gains = column_gains(self.response, self.shape, False)
        return float(gains[0]) if bool((gains == gains[0]).all()) else None

    def forms(self) -> Iterator[tuple[float, Plan]]:
        if self.box is not None and "decimated" in self.traits.forms:
            decimated = self._decimated(self.box)
            if decimated is not None:
                yield decimated
        if "mean" in self.traits.forms:
            mean = self._mean()
            if mean is not None:
                yield mean
        yield from self._by_columns(transpose=False)
        if self.traits.transposes and len(self.shape) > 1:
            yield from self._by_columns(transpose=True)

    def _decimated(self, box: Box) -> tuple[float, Plan] | None:
        """The cheapest pair of axis decimations within the error limit."""
        (height, width), (band_y, band_x), (nyquist_y, nyquist_x) = matrix_shape(self.shape), box.bands, box.nyquist
        costs, traits, dtype = self.traits.costs, self.traits, compute_dtype(self.dtype)
        best: tuple[float, Plan] | None = None
        row_windows = self._axis(height, band_y, nyquist_y, whole=traits.whole_rows, half_bins=traits.half_bins > 0)
        # The transforms along the width are real, and have no half bins.
        column_windows = list(self._axis(width, band_x, nyquist_x, whole=traits.whole_columns, half_bins=False))
        for rows, row_error in row_windows:
            for columns, column_error in column_windows:
                if not rows.taps and not columns.taps:
                    continue
                # Aliases into the band on the way down and out of it on the way up are orthogonal.
                error = math.sqrt(2) * math.hypot(row_error.alias, column_error.alias)
                error += 2 * _ROUNDING[dtype] * (1 + (row_error.amplification * column_error.amplification) ** 0.25)
                error += box.tail
                if error > ERROR_LIMIT[dtype]:
                    continue
                transformed = rows.cells * (traits.half_bins if half_bin(height, rows) else 1)
                grid = transformed * columns.cells
                if grid > _GRID_SHARE * height * width:
                    continue
                coarse = 2 * costs.coarse_fft * grid * math.log2(grid + 1) * (2 if grid > _CACHED_GRID else 1)
                cost = 3 * costs.move * height * width + coarse + costs.start / self.count
                down = costs.tap * rows.taps * height
                across = (costs.column_tap or costs.tap) * columns.taps * rows.cells
                cost += 2 * width * (down + across)
                cost += costs.call * 2 * (rows.cells + columns.cells + 4)
                if best is None or cost < best[0]:
                    best = cost, replace(
                        self.plan,
                        form="decimated",
                        background=box.background,
                        rows=rows,
                        columns=columns,
                        tiles=tiles(transformed, columns.cells, traits.block_bytes) if traits.own_transforms else None,
                        error_bound=error,
                        bytes_moved=self.nbytes * (3 if box.background else 2),
                    )  # fmt: skip
        return best

    def _mean(self) -> tuple[float, Plan] | None:
        """A single row whose gains are equal but at DC."""
        (height, width), gains = matrix_shape(self.shape), column_gains(self.response, self.shape, False)
        if height > 1 or bool((gains[1:] != gains[1]).any()):
            return None
        plan = replace(
            self.plan,
            form="mean",
            background=float(gains[1]),
            bytes_moved=3 * self.nbytes,
            error_bound=3 * _ROUNDING[compute_dtype(self.dtype)],
        )
        return 3 * self.traits.costs.move * width, plan

    def _axis(
        self, n: int, band: int, nyquist: bool, *, whole: bool, half_bins: bool
    ) -> Iterator[tuple[Decimation, WindowError]]:
        """Windows that reduce one axis, for each oversampling the two narrowest that are accurate enough; or none."""
        if whole:
            yield Decimation(n, 0, n // 2 + 1), WindowError(0.0, 1.0)
        if 2 * band - 1 >= n or (nyquist and n % 2 and not half_bins):
            return
        traits = self.traits
        limit = _ALIAS_LIMIT[compute_dtype(self.dtype)]
        least = n / traits.longest_sum if traits.longest_sum else 0
        wanted = (math.ceil(max(least, sigma * (2 * band - 1))) for sigma in traits.oversamplings)
        for cells in dict.fromkeys(_smooth(minimum, traits.cells_multiple) for minimum in wanted):
            accurate = 0
            for taps in traits.taps:
                d = Decimation(cells, taps, band, nyquist)
                if 2 * taps <= cells < n and (error := window_error(n, d)).alias < limit and accurate < 2:
                    accurate += 1
                    yield d, error

    def _by_columns(self, transpose: bool) -> Iterator[tuple[float, Plan]]:
        """The exact forms: real FFTs along one axis, complex ones along the other where the gain varies."""
        height, width = matrix_shape(self.shape)[::-1] if transpose else matrix_shape(self.shape)
        gains = column_gains(self.response, self.shape, transpose)
        background = _background_gain(gains)
        varying = int(np.count_nonzero(gains != background))
        costs, traits, dtype = self.traits.costs, self.traits, compute_dtype(self.dtype)
        row_factor, column_factor = _fft_factor(width), _fft_factor(height, traits.chirp_cost)
        across = 2 * costs.row_fft * height * width * row_factor * (costs.transposed if transpose else 1.0)
        steps = 2.5 if height == 1 else 6  # on a small matrix
        down = 2 * costs.column_fft * column_factor
        size = dtype.itemsize * height * (width + 2)
        pruned_size = 2 * dtype.itemsize * height * varying
        blocks = dtype.itemsize * (3 * width + 6 * height) * 16
        packs = traits.packs and self.dtype == dtype
        packed = packs and not transpose
        common = replace(self.plan, background=background, transposed=transpose)
        large = packs and size > _SMALL_BYTES
        if "pruned" in traits.forms and varying < gains.size and (not large or pruned_size <= _PRUNED_SHARE * size):
            # In 16 bits full has a spectrum of its own, too, and what pruned reads again is where it writes.
            moves = 3 if packs else 2
            cost = moves * costs.move * height * width + across + down * height * varying + steps * costs.call
            cost += 2 * costs.spectrum * height * varying
            work = pruned_size + blocks
            # The gains of its transforms are M - background, the more where M changes its sign.
            opposite = self.response.opposite(background, self.shape) if background else 0.0
            error = self.rounding * (1 + min(abs(background), opposite) / max(abs(background), opposite, 1e-300))
            pruned = replace(common, form="pruned", bytes_moved=3 * self.nbytes, workspace_bytes=work)
            yield cost, replace(pruned, error_bound=error)
        if "full" in traits.forms and not (large and transpose):
            moves = 6 if packed and large else 2
            transformed = gains.size if traits.streams else int(np.count_nonzero(np.isnan(gains)))
            cost = across + down * height * transformed
            cost += moves * costs.move * height * width
            cost += 2 * costs.spectrum * height * int(np.count_nonzero(gains))  # NaN, a gain that varies, counts
            cost += steps * costs.call / (1 if packed else self.count)  # else a batch takes the steps together
            work = blocks if packed else size + blocks
            fused = not transpose and height <= traits.fused_length and largest_prime(height) <= traits.fused_prime
            library = traits.row_library if height == 1 else ""
            full = replace(common, form="full", packed=packed, fused=fused, library=library)
            by_library = replace(full, bytes_moved=moves * self.nbytes, workspace_bytes=work)
            own = None if transpose else tiles(height, width, traits.block_bytes)
            if own is None:
                yield cost, by_library
                return
            ours = replace(by_library, fused=False, tiles=own)
            own_cost = cost + 2 * costs.row_fft * height * width * (_own_factor(width, own.row_chirp) - row_factor)
            length = height // own.parts
            columns = _own_factor(length, own.column_chirp) + math.log2(own.parts)
            own_cost += 2 * costs.column_fft * height * transformed * (columns - column_factor)
            # An estimate that no GPU has confirmed: own_transforms decides whose kernels come first.
            if traits.own_transforms:
                yield min(own_cost, cost), ours
            yield cost, by_library
            if not traits.own_transforms:
                yield max(own_cost, cost), ours


def _name(plan: Plan) -> str:
    ours = plan.form == "full" and plan.tiles is not None
    return plan.form + " transposed" * plan.transposed + " in three kernels" * ours


def _background_gain(gains: np.ndarray) -> float:
    """The gain that most columns have throughout; 0 if every column varies."""
    constant = gains[~np.isnan(gains)]
    if not constant.size:
        return 0.0
    values, counts = np.unique(constant, return_counts=True)
    return float(values[np.argmax(counts)])


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


def _fft_factor(n: int, chirp_cost: float = 3.0) -> float:
    """log2 n, with the price of lengths that have a large prime factor."""
    return math.log2(n + 1) * (1.0 if _direct(n) else chirp_cost)


def _own_factor(n: int, chirp: int) -> float:
    """The same for three kernels, which make two transforms of ``chirp`` points of it."""
    return 2 * chirp / n * math.log2(chirp) if chirp else math.log2(n + 1)


def _direct(n: int) -> bool:
    """Whether the prime factors of a length are small enough for an FFT without a convolution."""
    return largest_prime(n) <= _DIRECT_PRIME
