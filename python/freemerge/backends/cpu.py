"""The native CPU backend: the compiled kernels of ``csrc/cpu``, one set per instruction set, chosen at run time.

``FREEMERGE_ISA`` (avx512, avx2 or baseline) forces a set. Threads follow :func:`torch.get_num_threads`,
which is 1 in a forked process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch

from .. import _core
from ..dense import address
from ..planner.costs import Costs, Traits
from ..planner.layout import ROWS
from ..planner.plan import Decimation, Plan
from ..responses import MaskParams, has_closed_form
from .base import Backend, BackendInfo, Check, Entries, Executable, unchecked
from .memory import DTYPE_CODES, addresses, matrices, pointer, sample
from .sparse import BackendSwitch, Scratch, Update, addresses_of, mark_changed, memory_of, moved, native_updates

# OpenMP would wait for the threads that a fork leaves behind, in torch's loops as in ours.
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))

# Fitted to 130 plans of 7 shapes on one busy core of a Sapphire Rapids Xeon (AVX-512), ns.
_COSTS = Costs(
    move=0.1, tap=0.035, row_fft=0.11, column_fft=0.28, coarse_fft=0.05, spectrum=0.15, transposed=1.1,
    call=80.0,  # before a decimated form runs, the mean is looked at, which counts where the matrix is tiny
)  # fmt: skip


class CpuBackend(Backend):
    """Every form in fp32, bf16 and fp16; the exact forms in fp64 too."""

    name = "cpu"
    preference = 1

    def info(self) -> BackendInfo:
        return _info()

    def takes(self, tensors: Sequence[torch.Tensor]) -> str | None:
        return None if all(tensor.is_cpu for tensor in tensors) else "needs CPU tensors"

    def traits(self, device: torch.device) -> Traits | None:
        return _traits() if device.type == "cpu" else None

    def supports(self, plan: Plan) -> str | None:
        if plan.form in _core.FORMS and plan.dtype == torch.float64 and not has_closed_form(plan.response):
            return "its tables of gains are fp32"
        cells = [axis.cells for axis in (plan.rows, plan.columns) if axis is not None]
        for n in cells if plan.form == "decimated" else plan.matrix if plan.form in _core.FORMS else ():
            if not _core.has_transform(n):
                return f"it has no transforms of {n} samples"
        if plan.form == "decimated":
            if plan.dtype == torch.float64:
                return "its windowed passes compute in fp32"
            for n, axis, name in zip(plan.matrix, (plan.rows, plan.columns), ("height", "width"), strict=True):
                if axis != Decimation(n, 0, n // 2 + 1) and not _windowed(n, axis):
                    return f"it has no kernel for {axis} along the {name}"
            if plan.rows is not None and plan.rows.taps and plan.rows.cells % _core.ROW_CELLS_MULTIPLE:
                return f"its coarse rows come in groups of {_core.ROW_CELLS_MULTIPLE}"
        return None

    def prepare(self, plan: Plan) -> Executable:
        return _Filter(plan)

    def weighted_sum(
        self,
        base: torch.Tensor,
        models: Sequence[torch.Tensor],
        weights: Sequence[float] | None,
        out: torch.Tensor | None,
    ) -> list[float]:
        return _accumulate(base, models, weights, out)[0]

    def filtered_sum(
        self,
        plan: Plan,
        base: torch.Tensor,
        models: Sequence[torch.Tensor],
        weights: Sequence[float],
        out: torch.Tensor,
        check: Check = unchecked,
    ) -> tuple[list[float], float, float, torch.Tensor] | None:
        if plan.layout != ROWS or math.prod(out.shape[:-2]) != 1:
            return None
        means, before = _accumulate(base, models, weights, out, squares=True)
        check(means)
        self.executable(plan).run([out.view(out.shape[-2:])], 1.0)
        return means, before, self.square_sum(out), out

    def part_means(self, base: torch.Tensor, models: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[list[float]]:
        first, *others = pointer(base), *map(pointer, models)
        codes, steps = [code for _, code in others], [model.element_size() for model in models]
        means, at, step_of_base = [], 0, base.element_size()
        for n in sizes:  # on addresses: making a tensor of each part would take longer than the work
            pointers = [address + at * step for (address, _), step in zip(others, steps, strict=True)]
            where = first[0] + at * step_of_base
            means.append(_core.accumulate(0, where, first[1], pointers, codes, [], False, n, 1)[0])
            at += n
        return means

    def square_sum(self, tensor: torch.Tensor) -> float:
        return _core.square_sum(*pointer(tensor), tensor.numel(), torch.get_num_threads())

    def add_round(
        self, out: torch.Tensor, base: torch.Tensor, delta: torch.Tensor, scale: float, factor: float
    ) -> bool:
        return _core.add_round(
            *pointer(out), *pointer(base), *pointer(delta), scale, factor, out.numel(), torch.get_num_threads()
        )

    def elect(
        self,
        delta: torch.Tensor,
        weight: float,
        least: float,
        outlier: float,
        sums: Sequence[torch.Tensor],
        shares: Sequence[torch.Tensor],
    ) -> None:
        _core.elect(
            _addresses(sums), _addresses(shares), *pointer(delta), weight, least, outlier, delta.numel(),
            torch.get_num_threads(),
        )  # fmt: skip

    def decide(self, sums: Sequence[torch.Tensor], shares: Sequence[torch.Tensor]) -> None:
        first = sums[0]
        _core.decide(
            _addresses(sums), _addresses(shares), DTYPE_CODES[first.dtype], first.numel(), torch.get_num_threads()
        )

    def select_largest(self, model: torch.Tensor, base: torch.Tensor, rows: int, width: int, k: int) -> Entries:
        return _entries(_core.select_largest(*pointer(model), *pointer(base), rows, width, k, torch.get_num_threads()))

    def count_magnitudes(
        self, model: torch.Tensor, base: torch.Tensor | None, counts: torch.Tensor, shift: int, above: int
    ) -> None:
        bits = counts.numel().bit_length() - 1
        _core.count_magnitudes(
            *pointer(model), *(pointer(base) if base is not None else (0, 0)), model.numel(), shift, bits, above,
            address(counts), torch.get_num_threads(),
        )  # fmt: skip

    def select_from_bin(self, model: torch.Tensor, base: torch.Tensor, lowest: int) -> Entries:
        return _entries(
            _core.select_from_bin(*pointer(model), *pointer(base), model.numel(), lowest, torch.get_num_threads())
        )

    def switch(self, updates: Sequence[Update]) -> BackendSwitch:
        return _Switch(updates)


@cache
def _info() -> BackendInfo:
    try:
        isa = _core.active_isa()
    except ValueError as error:
        return BackendInfo(CpuBackend.name, False, str(error))
    return BackendInfo(CpuBackend.name, True, details={"isa": isa, "processor": _core.detected_isa()})


@cache
def _traits() -> Traits:
    return Traits(
        forms=frozenset(("identity", "scale", *_core.FORMS)),
        dtypes=frozenset(DTYPE_CODES),
        costs=_COSTS,
        taps=_core.TAPS,
        whole_columns=True,
        whole_rows=True,
        half_bins=1,
        longest_sum=128,  # a chain of more loses the accuracy that plans promise
        cells_multiple=_core.ROW_CELLS_MULTIPLE,
        transposes=True,
        packs=True,
        chirp_stages=2.0,
        slow_rows="it fills one SIMD lane of its transforms",
        # Other forms sum less, and 16-bit storage is rounded more coarsely than the filter rounds.
        centers={"decimated": frozenset((torch.float32,))},
        workspace=_workspace,
    )


class _Filter(Executable):
    """A native filter, which holds everything it needs."""

    def __init__(self, plan: Plan) -> None:
        self._rows, self._width = plan.matrix
        response, gains, table, background = plan.response, plan.column_gains, None, plan.background
        if has_closed_form(response):
            mask = response.params(plan.shape)
        else:
            mask = MaskParams("table", *plan.matrix)
            table = np.ascontiguousarray(response.half_mask(plan.shape), dtype=np.float32)
            gains, background = gains.astype(np.float32), float(np.float32(background))  # as the table has them
        self._native = _core.Filter(
            form=plan.form,
            mask=mask,
            table=0 if table is None else table.ctypes.data,
            dtype=DTYPE_CODES[plan.dtype],
            transposed=plan.transposed,
            packed=plan.packed,
            background=background,
            rows=plan.rows,
            columns=plan.columns,
            column_gains=gains,
        )
        self._centers = plan.centers
        self.nbytes = self._native.nbytes

    def run(self, batches: Sequence[torch.Tensor], scale: float) -> None:
        threads = torch.get_num_threads()
        means = [_dominant_mean(x) for x in matrices(batches)] if self._centers else []
        if len(batches) == 1 and (x := batches[0]).ndim == 2:  # in little time, as for a small matrix it counts
            self._native.run([address(x)], [x.stride()[0] if self._rows > 1 else self._width], scale, threads, means)
            return
        self._native.run(*addresses(batches), scale, threads, means)  # of all at once: it writes nothing, or everything


class _Switch(BackendSwitch):
    def __init__(self, updates: Sequence[Update]) -> None:
        self._jobs, self._kept = native_updates(updates)
        self._switch = _core.SparseSwitch(self._jobs)

    def on(self, weights: Sequence[torch.Tensor], scratch: Scratch) -> Callable[[], None]:
        saved = scratch.take(self._switch.saved_bytes)
        memory, place = memory_of(weights), address(saved)
        then = addresses_of(memory)

        def restore() -> None:
            here = addresses_of(memory) == then
            switch = self._switch if here else _core.SparseSwitch(moved(self._jobs, memory))
            switch.restore(place, torch.get_num_threads())
            mark_changed(weights)
            scratch.give(saved)

        threads = torch.get_num_threads()
        try:
            self._switch.apply(place, threads)
            mark_changed(weights)
        except BaseException:  # of a signal: Python tells of it when the native code, which cannot fail, is through
            restore()
            raise
        return restore


def _dominant_mean(x: torch.Tensor) -> float:
    """The mean of a matrix, by a sample, if it exceeds the sample's deviation, else 0."""
    deviation, mean = map(float, torch.std_mean(sample(x), correction=0))
    return mean if abs(mean) > deviation else 0.0  # where a value is not finite, deviation is NaN


def _accumulate(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    weights: Sequence[float] | None,
    out: torch.Tensor | None,
    *,
    squares: bool = False,
) -> tuple[list[float], float]:
    """The means of task vectors, whose weighted sum ``out`` receives, and its sum of squares if that is wanted."""
    return _core.accumulate(
        0 if out is None else address(out), *pointer(base), [address(model) for model in models],
        [DTYPE_CODES[model.dtype] for model in models], list(weights or ()), squares, base.numel(),
        torch.get_num_threads(),
    )  # fmt: skip


def _addresses(both: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Of two tensors, or of none."""
    return (address(both[0]), address(both[1])) if both else (0, 0)


def _entries(found: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]) -> Entries:
    indices, values = found
    return torch.from_numpy(indices), torch.from_numpy(values)


def _workspace(plan: Plan) -> int:
    """Bytes on one thread with the widest vectors: of the decimated form the box's coarse spectrum, a ring of coarse
    rows, and a transform with its work space."""
    if plan.form != "decimated" or plan.rows is None or plan.columns is None:
        return plan.workspace_bytes
    columns = -(-plan.columns.band // _core.MAX_LANES) * _core.MAX_LANES
    ring = (_core.MAX_LANES + plan.rows.taps) * (plan.matrix[1] + 5 * _core.MAX_LANES) if plan.rows.taps else 0
    transform = 2 * _core.MAX_LANES * (max(plan.rows.cells, plan.columns.cells) + 2 * plan.columns.cells)
    return 8 * plan.rows.cells * columns + 4 * (ring + transform)


def _windowed(n: int, axis: Decimation | None) -> bool:
    return axis is not None and axis.taps in _core.TAPS and 2 * axis.taps <= axis.cells <= n
