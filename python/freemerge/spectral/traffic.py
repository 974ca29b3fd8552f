"""What a plan of the CUDA backend moves, stage by stage, from the plan alone: the model behind its tuning.

Memory is of two kinds. The matrix and the spectrum are too big for the cache and live in device memory. Panels (stages
of lines, coarse rows) are written by one kernel and read by the next while they are still in L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .cuda_backend import columns_to_transform
from .plan import Plan

Where = Literal["matrix", "spectrum", "panel"]
_FLOAT, _COMPLEX = 4, 8


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
    """The traffic of a decimated, pruned or full plan; of the others, that of reading and writing the matrix."""
    if plan.form == "decimated":
        return Traffic(plan, tuple(_decimated(plan)))
    if plan.form in ("pruned", "full") and columns_to_transform(plan)[0].size:
        return Traffic(plan, tuple(_by_columns(plan)))
    moved = 0 if plan.form == "identity" else _matrix_bytes(plan)
    return Traffic(plan, (Step("scale", "matrix", moved, moved),))


def _matrix_bytes(plan: Plan) -> int:
    height, width = plan.matrix
    return height * width * plan.dtype.itemsize


def _decimated(plan: Plan) -> list[Step]:
    assert plan.rows is not None
    assert plan.columns is not None
    matrix = _matrix_bytes(plan)
    _, width = plan.matrix
    panel = plan.rows.cells * width * _FLOAT
    grid = plan.rows.cells * plan.columns.cells * _FLOAT
    spectrum = plan.rows.cells * (plan.columns.cells // 2 + 1) * _COMPLEX
    kept = matrix if plan.background else 0
    return [
        Step("down_rows", "matrix", matrix, 0),  # and the rows that neighbouring blocks share, which L2 serves
        Step("down_rows", "panel", 0, panel),
        Step("down_columns", "panel", panel, grid),
        Step("cuFFT R2C", "panel", grid, spectrum),
        Step("coarse_mask", "panel", spectrum, spectrum),
        Step("cuFFT C2R", "panel", spectrum, grid),
        Step("up_columns", "panel", grid, panel),
        Step("up_rows", "panel", panel, 0),
        Step("up_rows", "matrix", kept, matrix),
    ]


def _by_columns(plan: Plan) -> list[Step]:
    height, width = plan.matrix
    lines, length = (width, height) if plan.transposed else (height, width)
    columns, background = columns_to_transform(plan)
    matrix = _matrix_bytes(plan)
    stage = lines * length * _FLOAT
    bins = lines * (length // 2 + 1) * _COMPLEX
    spectrum = lines * columns.size * _COMPLEX
    # Of the four passes over a panel of columns only the first reads and the last writes device memory.
    transforms = (
        [] if lines == 1 else [Step("cuFFT C2C", "spectrum", spectrum, 0), Step("cuFFT C2C", "panel", 0, spectrum)]
    )
    inverses = (
        [] if lines == 1 else [Step("cuFFT C2C", "panel", spectrum, 0), Step("cuFFT C2C", "spectrum", 0, spectrum)]
    )
    mask: Where = "spectrum" if lines == 1 else "panel"
    return [
        Step("pack", "matrix", matrix, 0),
        Step("pack", "panel", 0, stage),
        Step("cuFFT R2C", "panel", stage, bins),
        Step("gather", "panel", spectrum, 0),
        Step("gather", "spectrum", 0, spectrum),
        *transforms,
        Step("column_mask", mask, spectrum, spectrum),
        *inverses,
        Step("scatter", "spectrum", spectrum, 0),
        Step("scatter", "panel", 0, bins),
        Step("cuFFT C2R", "panel", bins, stage),
        Step("unpack", "panel", stage, 0),
        Step("unpack", "matrix", matrix if background else 0, matrix),
    ]
