"""The CUDA backend: kernels and cuFFT behind the optional module ``freemerge._cuda``, on torch's streams and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..cache import TABLE_BYTES, Cache, table_bytes
from ..errors import BackendError
from ..planner.costs import Costs, Traits
from ..planner.plan import Decimation, Form, Plan
from ..responses import MaskParams, Response, matrix_shape
from .base import BackendInfo, addresses, multiply_
from .cuda_runtime import DTYPES, RUNTIME, Runtime, Stream
from .native import DTYPE_CODES

_FORMS: frozenset[Form] = frozenset(("identity", "scale", "decimated", "full"))
_DTYPES = frozenset(DTYPES)
_MAX_TAPS = 12

# Fitted to benchmarks/gpu_suite.py on an H100: ns, on 13 shapes from 768 x 768 to 151936 x 896.
_COSTS = Costs(
    move=0.0024, tap=0.00008, dense=0.0, row_fft=0.0001, column_fft=0.001, coarse_fft=0.0008, column_tap=0.00033,
    start=60_000.0,
)  # fmt: skip

_FILTER_BYTES = 1 << 19  # of a cached filter itself: at most so many share the bytes of their tables
_CACHED_SIZES = 16
_FFT_ALIGNMENT = 8  # bytes of a complex number, to which cuFFT wants real ones aligned


@dataclass(frozen=True)
class _Prepared:
    """A native filter and the device memory it points into; no filter where the gain is the background throughout."""

    native: Any
    tables: tuple[torch.Tensor, ...]
    sizes: Cache[tuple[int, ...], int] = field(default_factory=lambda: Cache(_CACHED_SIZES))
    streams: set[int] = field(default_factory=set)  #: those whose work the tables' memory waits for when it is freed

    def workspace(
        self, batches: Sequence[torch.Tensor], pointers: list[int], strides: list[int], stream: Stream
    ) -> int:
        """Bytes of workspace for these matrices; it depends on how they lie in memory, as cuFFT's plans do."""

        def ask() -> int:
            return int(self.native.workspace(pointers, strides, stream.device, stream.handle))

        if len(batches) != 1:
            return ask()
        (batch,) = batches
        return self.sizes.get((batch.data_ptr() % _FFT_ALIGNMENT, batch.shape[0], *batch.stride()), ask)


class CudaBackend:
    """Runs decimated and full plans in fp32, bf16 and fp16, on the current stream, without waiting for it.

    After one call with the same shapes, calls can be recorded in a CUDA graph.
    """

    name = "cuda"

    def __init__(self, runtime: Runtime = RUNTIME) -> None:
        self._runtime = runtime
        self._tables: Cache[object, tuple[torch.Tensor, ...]] = Cache(TABLE_BYTES, table_bytes)
        self._filters: Cache[Plan, _Prepared] = Cache(
            TABLE_BYTES, lambda prepared: _FILTER_BYTES + table_bytes(prepared.tables)
        )

    def info(self) -> BackendInfo:
        reason, details = self._runtime.state
        return BackendInfo(self.name, not reason, reason, details)

    def traits(self, device: torch.device) -> Traits | None:
        if device.type != self._runtime.device_type:
            return None
        return Traits(
            forms=_FORMS,
            dtypes=_DTYPES,
            costs=_COSTS,
            taps=(8, 10, _MAX_TAPS),
            whole_columns=True,
            streams=True,
            workspace=self.workspace_bytes,
            centers=True,
        )

    def supports(self, plan: Plan) -> str | None:
        if plan.dtype not in _DTYPES:
            return f"has no arithmetic for {plan.dtype}"
        if plan.form not in _FORMS:
            return f"has no form {plan.form!r}"
        for axis in (plan.rows, plan.columns):
            whole = axis is plan.columns and axis is not None and axis.cells == plan.matrix[1]
            if axis is not None and not whole and not 2 <= axis.taps <= _MAX_TAPS:
                return f"has no windows of {axis.taps} taps"
        return None

    def workspace_bytes(self, plan: Plan) -> int:
        """Device memory that :meth:`run` takes beside the matrices, at most, for any number of them."""
        stream = self._runtime.stream(torch.device(plan.device))
        prepared = self._prepared(plan, stream)
        return prepared.workspace([], [], [], stream) if prepared.native is not None else 0

    def run(self, plan: Plan, batches: Sequence[torch.Tensor], scale: float) -> None:
        if not batches:
            return
        device = batches[0].device
        stream = self._runtime.stream(device)
        prepared = self._prepared(plan, stream)
        if prepared.native is None:
            multiply_(batches, scale * plan.background)
            return
        pointers, strides = addresses(batches)
        needed = prepared.workspace(batches, pointers, strides, stream)
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)
        prepared.native.run(
            pointers, strides, scale, workspace.data_ptr(), needed, stream.device, stream.handle,
        )  # fmt: skip
        if stream.handle not in prepared.streams and self._runtime.device_type == "cuda":
            # A table dropped from the cache must not be reused before this stream is done with it.
            current = torch.cuda.current_stream(device)
            for table in prepared.tables:
                table.record_stream(current)
            prepared.streams.add(stream.handle)

    # --- executing a plan -----------------------------------------------------------------------------------------

    def _prepared(self, plan: Plan, stream: Stream) -> _Prepared:
        self._runtime.require()
        # A graph keeps addresses: what it refers to must stay.
        return self._filters.get(plan, lambda: self._prepare(plan, stream), pin=stream.capturing)

    def _prepare(self, plan: Plan, stream: Stream) -> _Prepared:
        if plan.form in ("identity", "scale"):
            return _Prepared(None, ())
        if stream.capturing:
            raise BackendError("backend cuda cannot upload tables while a graph is recorded; run the same call before")
        code = DTYPE_CODES[plan.dtype]
        module, device = self._runtime.module, plan.device
        if plan.form == "decimated":
            assert plan.rows is not None
            assert plan.columns is not None
            height, width = plan.matrix
            padded = module.padded_taps(max(plan.rows.taps, plan.columns.taps))
            rows, row_tables = self._window(height, plan.rows, padded, device)
            columns, column_tables = self._window(width, plan.columns, padded, device)
            mask = plan.response.params(plan.shape)
            native = module.Filter.decimated(mask, code, plan.background, rows, columns)
            return _Prepared(native, row_tables + column_tables)
        height, _ = plan.matrix
        mask, tables = self._mask(plan.response, plan.shape, device)
        gains = _upload(plan.response.column_gains(plan.shape).astype(np.float32), device)
        fused = module.column_filter_takes(height, stream.device, stream.handle)
        roots = self._tables.get((height, device), lambda: (_upload(_roots(height), device),)) if fused else ()
        steps = (_upload(module.step_rows(mask), device),) if fused and mask.kind == "steps" else ()
        native = module.Filter.full(
            mask, _address(tables), code, gains.data_ptr(), _address(steps), _address(roots),
        )  # fmt: skip
        return _Prepared(native, (gains, *steps, *roots, *tables))

    def _window(self, n: int, d: Decimation, padded: int, device: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
        module, window = self._runtime.module, (n, d.cells, d.taps, d.band, d.nyquist, padded)
        if not d.taps:
            return module.Window.whole(n), ()
        tables = self._tables.get(
            (window, device),
            lambda: tuple(_upload(array, device) for array in module.window_tables(*window)),
        )
        reach = tables[4].numel() // d.cells
        return module.Window(*window, reach, *(table.data_ptr() for table in tables)), tables

    def _mask(
        self, response: Response, shape: tuple[int, ...], device: str
    ) -> tuple[MaskParams, tuple[torch.Tensor, ...]]:
        """The mask in closed form, or a table of it where a response has none."""
        try:
            return response.params(shape), ()
        except TypeError:
            pass
        height, width = matrix_shape(shape)
        tables = self._tables.get(
            (response, shape, device),
            lambda: (_upload(response.half_mask(shape).astype(np.float32), device),),
        )
        return MaskParams("table", height, width), tables


def _roots(n: int) -> npt.NDArray[np.float32]:
    """exp(-2 pi i k / n) for every k, as pairs of floats."""
    angles = -2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def _address(tables: Sequence[torch.Tensor]) -> int:
    """Where the first one lies, or 0 if there is none."""
    return tables[0].data_ptr() if tables else 0


def _upload(array: npt.NDArray[Any], device: str) -> torch.Tensor:
    # Waits for the copy, so that any stream may read the table afterwards.
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, copy=True)
