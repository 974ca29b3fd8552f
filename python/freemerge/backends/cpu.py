"""The native CPU backend: the compiled kernels of ``csrc/cpu``, one set per instruction set, chosen at run time.

``FREEMERGE_ISA`` (avx512, avx2 or baseline) forces a set. Threads follow :func:`torch.get_num_threads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from .. import _core
from ..planner.costs import Costs, Traits
from ..planner.plan import Decimation, Form, Plan
from ..responses import MaskParams, has_closed_form
from .base import BackendInfo, addresses, multiply_
from .native import DTYPE_CODES

_FORM_CODES: dict[Form, int] = {"decimated": 1, "pruned": 2, "full": 3}  # enum class Form in csrc/common/plan.h

_TAPS = (6, 7, 8, 9)
_CELLS_MULTIPLE = 32
_LANES = 16  # floats in the widest vector

# Fitted to 130 plans of 7 shapes on one busy core of a Sapphire Rapids Xeon (AVX-512), ns.
_COSTS = Costs(
    move=0.1, tap=0.035, dense=0.0, row_fft=0.11, column_fft=0.28, coarse_fft=0.05, spectrum=0.15, transposed=1.1,
    call=80.0,  # before a decimated form runs, the mean is looked at, which counts where the matrix is tiny
)  # fmt: skip


class CpuBackend:
    """Every form in fp32, bf16 and fp16; the exact forms in fp64 too."""

    name = "cpu"

    def info(self) -> BackendInfo:
        try:
            isa = _core.active_isa()
        except ValueError as error:
            return BackendInfo(self.name, False, str(error))
        return BackendInfo(self.name, True, details={"isa": isa, "processor": _core.detected_isa()})

    def traits(self, device: torch.device) -> Traits | None:
        if device.type != "cpu":
            return None
        return Traits(
            forms=frozenset(("identity", "scale", *_FORM_CODES)),
            dtypes=frozenset(DTYPE_CODES),
            costs=_COSTS,
            taps=_TAPS,
            whole_columns=True,
            longest_sum=128,  # a chain of more loses the accuracy that plans promise
            cells_multiple=_CELLS_MULTIPLE,
            transposes=True,
            packs=0,
            slow_rows="it fills one SIMD lane of its transforms",
            workspace=_workspace,
        )

    def supports(self, plan: Plan) -> str | None:
        if plan.form == "thin":
            return "it has no dense windows"
        if plan.form in _FORM_CODES and plan.dtype == torch.float64 and not has_closed_form(plan.response):
            return "its tables of gains are fp32"
        if plan.form == "decimated":
            if plan.dtype == torch.float64:
                return "its windowed passes compute in fp32"
            height, width = plan.matrix
            if not _windowed(height, plan.rows):
                return f"it has no kernel for {plan.rows} along the height"
            whole = plan.columns == Decimation(width, 0, width // 2 + 1)
            if not whole and not _windowed(width, plan.columns):
                return f"it has no kernel for {plan.columns} along the width"
            if plan.rows is not None and plan.rows.cells % _CELLS_MULTIPLE:
                return f"its coarse rows come in groups of {_CELLS_MULTIPLE}"
        return None

    def run(self, plan: Plan, batches: Sequence[torch.Tensor], scale: float) -> None:
        if plan.form in ("identity", "scale"):
            multiply_(batches, scale * plan.background)
            return
        native, _table = _native_plan(plan)
        by_stride: dict[int, list[int]] = {}
        for pointer, stride in zip(*addresses(batches), strict=True):
            by_stride.setdefault(stride, []).append(pointer)
        for stride, pointers in by_stride.items():
            _core.filter(pointers, DTYPE_CODES[plan.dtype], native, stride, scale, torch.get_num_threads())


def _workspace(plan: Plan) -> int:
    """Bytes on one thread with the widest vectors: of the decimated form the box's coarse spectrum, a ring of coarse
    rows, and a transform with its work space."""
    if plan.form != "decimated" or plan.rows is None or plan.columns is None:
        return plan.workspace_bytes
    columns = -(-plan.columns.band // _LANES) * _LANES
    ring = (_LANES + plan.rows.taps) * (plan.matrix[1] + 5 * _LANES)
    transform = 2 * _LANES * (max(plan.rows.cells, plan.columns.cells) + 2 * plan.columns.cells)
    return 8 * plan.rows.cells * columns + 4 * (ring + transform)


def _windowed(n: int, axis: Decimation | None) -> bool:
    return axis is not None and axis.taps in _TAPS and 2 * axis.taps <= axis.cells <= n


@lru_cache(maxsize=64)
def _native_plan(plan: Plan) -> tuple[_core.Plan, np.ndarray | None]:
    """The plan as the kernels take it, and the mask's table, whose memory it points to."""
    height, width = plan.matrix
    table, background = None, plan.background
    if not has_closed_form(plan.response):
        table = np.ascontiguousarray(plan.response.half_mask(plan.shape), dtype=np.float32)
        mask = MaskParams("table", height, width)
        background = float(np.float32(background))  # as the table has it
    else:
        mask = plan.response.params(plan.shape)
    native = _core.Plan(
        form=_FORM_CODES[plan.form],
        mask=mask,
        table=0 if table is None else table.ctypes.data,
        transposed=plan.transposed,
        packed=plan.packed,
        background=background,
        rows=_native_decimation(plan.rows),
        columns=_native_decimation(plan.columns),
    )
    return native, table


def _native_decimation(d: Decimation | None) -> _core.Decimation:
    if d is None:
        return _core.Decimation(cells=0, taps=0, band=0)
    return _core.Decimation(cells=d.cells, taps=d.taps, band=d.band, nyquist=d.nyquist)
