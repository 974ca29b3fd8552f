"""What a plan of the CUDA backend moves, stage by stage, from the plan alone: the model behind its tuning.

Memory is of two kinds. The matrix and the spectrum are too big for the cache and live in device memory. Panels (packed
rows, coarse rows) are written by one kernel and read by the next while they are still in L2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from freemerge.planner.plan import Plan
from freemerge.planner.windows import half_bin

Where = Literal["matrix", "spectrum", "panel"]
_FLOAT, _COMPLEX = 4, 8
MODELS_IN_ONE_PASS = 16


@dataclass(frozen=True)
class Step:
    """One kernel or cuFFT call, or all of its repetitions: bytes read from and written to one kind of memory."""

    name: str
    where: Where
    read: int
    written: int


@dataclass(frozen=True)
class Traffic:
    """The steps of a plan for one matrix, scale and rounding included."""

    plan: Plan
    steps: tuple[Step, ...]

    def bytes(self, *where: Where) -> int:
        """Bytes read and written in those kinds of memory; in all of them if none is given."""
        return sum(step.read + step.written for step in self.steps if not where or step.where in where)

    def per_element(self, *where: Where) -> float:
        """The same for each entry of the matrix."""
        height, width = self.plan.matrix
        return self.bytes(*where) / (height * width)


def traffic(plan: Plan) -> Traffic:
    """The traffic of a decimated or full plan; of the others, that of reading and writing the matrix."""
    if plan.form == "decimated":
        return Traffic(plan, tuple(_decimated(plan)))
    if plan.form == "full":
        return Traffic(plan, tuple(_full(plan)))
    moved = 0 if plan.form == "identity" else _matrix_bytes(plan)
    return Traffic(plan, (Step("scale", "matrix", moved, moved),))


def merge_traffic(plan: Plan, models: int, stored: torch.dtype) -> Traffic:
    """The traffic of FR-Merging one matrix that lies on the device, with its energy: base, models and what they are
    merged to are of dtype ``stored``; ``plan`` filters the float32 sum."""
    entries = math.prod(plan.matrix)
    matrix, read = _matrix_bytes(plan), entries * stored.itemsize
    steps = list(traffic(plan).steps)
    if models <= MODELS_IN_ONE_PASS and (plan.form == "decimated" or plan.tiles is not None):
        # The filter's first pass forms the sum, of which three kernels write the spectra alone; the last adds the base.
        name, written = ("spread_sum", matrix) if plan.form == "decimated" else ("rows_to_spectra", 0)
        steps[0] = Step(name, "matrix", (models + 1) * read, written)
        steps[-1] = replace(steps[-1], read=steps[-1].read + read, written=read)
        return Traffic(plan, tuple(steps))
    norm = Step("norm", "matrix", matrix, 0)
    steps = [Step("sum", "matrix", (models + 1) * read, matrix), norm, *steps, norm]
    return Traffic(plan, (*steps, Step("add_round", "matrix", matrix + read, read)))


def _matrix_bytes(plan: Plan) -> int:
    height, width = plan.matrix
    return height * width * plan.dtype.itemsize


def _decimated(plan: Plan) -> list[Step]:
    assert plan.rows is not None
    assert plan.columns is not None
    matrix = _matrix_bytes(plan)
    height, width = plan.matrix
    panel = plan.rows.cells * width * _FLOAT  # and what two blocks share of coarse rows and columns
    grid = plan.rows.cells * plan.columns.cells * _FLOAT
    rows = plan.rows.cells * (2 if half_bin(height, plan.rows) else 1)  # of what is transformed: the rest are zeros
    transformed = rows * plan.columns.cells * _FLOAT
    spectrum = rows * (plan.columns.cells // 2 + 1) * _COMPLEX
    kept = matrix if plan.background else 0
    table = rows * plan.columns.band * _FLOAT  # of gains
    coarse = [
        Step("rows_to_spectra", "panel", transformed, spectrum),
        Step("column_filter", "panel", spectrum + table, spectrum),
        Step("spectra_to_rows", "panel", spectrum, transformed),
    ]
    by_cufft = [
        Step("cuFFT R2C", "panel", transformed, spectrum),
        Step("coarse_mask", "panel", spectrum, spectrum),
        Step("cuFFT C2R", "panel", spectrum, transformed),
    ]
    return [
        Step("spread_rows", "matrix", matrix, 0),
        Step("spread_rows", "panel", 0, panel),
        Step("spread_columns", "panel", panel + grid, transformed + grid),  # the grid is cleared, then added to
        *(by_cufft if plan.tiles is None else coarse),
        Step("interpolate", "panel", grid, 0),
        Step("interpolate", "matrix", kept, matrix),
    ]


def columns_touched(plan: Plan) -> int:
    """Columns of the spectrum that a plan with tiles reads and writes: those of blocks that are not all of gain 1."""
    assert plan.tiles is not None
    gains, count = plan.column_gains.astype(np.float32), plan.tiles.columns
    blocks = [gains[first : first + count] for first in range(0, gains.size, count)]
    return sum(block.size for block in blocks if bool((block != 1).any()))


def _three_kernels(plan: Plan) -> list[Step]:
    height, width = plan.matrix
    matrix = _matrix_bytes(plan)
    spectrum = height * (width // 2 + 1) * _COMPLEX  # in the memory of a float32 matrix, but for its last column
    columns = height * columns_touched(plan) * _COMPLEX
    return [
        Step("rows_to_spectra", "matrix", matrix, 0),
        Step("rows_to_spectra", "spectrum", 0, spectrum),
        Step("column_filter", "spectrum", columns, columns),
        Step("spectra_to_rows", "spectrum", spectrum, 0),
        Step("spectra_to_rows", "matrix", 0, matrix),
    ]


def _full(plan: Plan) -> list[Step]:
    if plan.tiles is not None:
        return _three_kernels(plan)
    height, width = plan.matrix
    matrix = _matrix_bytes(plan)
    rows = height * width * _FLOAT
    spectrum = height * (width // 2 + 1) * _COMPLEX
    # Columns that are not fused are left to cuFFT, which then moves the spectrum twice more.
    columns = [Step("column_filter" if plan.fused else "column_mask", "spectrum", spectrum, spectrum)]
    if plan.dtype.itemsize == _FLOAT:  # cuFFT reads and writes the matrix itself
        return [
            Step("cuFFT R2C", "matrix", matrix, 0),
            Step("cuFFT R2C", "spectrum", 0, spectrum),
            *columns,
            Step("cuFFT C2R", "spectrum", spectrum, 0),
            Step("cuFFT C2R", "matrix", 0, matrix),
        ]
    return [
        Step("pack", "matrix", matrix, 0),
        Step("pack", "panel", 0, rows),
        Step("cuFFT R2C", "panel", rows, 0),
        Step("cuFFT R2C", "spectrum", 0, spectrum),
        *columns,
        Step("cuFFT C2R", "spectrum", spectrum, 0),
        Step("cuFFT C2R", "panel", 0, rows),
        Step("unpack", "panel", rows, 0),
        Step("unpack", "matrix", 0, matrix),
    ]
