"""The CUDA backend: kernels and cuFFT behind the optional module ``freemerge._cuda``, on torch's streams and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..cuda import DTYPES, RUNTIME, Runtime, Stream
from ..errors import BackendError
from ..native import DTYPE_CODES
from ..responses import MaskParams, Response, matrix_shape, transposed
from .backend import BackendInfo, Costs, Traits, addresses, multiply_
from .cache import Cache
from .plan import Decimation, Form, Plan

_FORMS: frozenset[Form] = frozenset(("identity", "scale", "decimated", "pruned", "full"))
_DTYPES = frozenset(DTYPES)
_MAX_TAPS = 12
_TABLE_MASK = 5  # MaskKind::kTable

# From the traffic model of an H100 (3.35 TB/s of memory, 5.5 TB/s of L2, 60 Tflop/s), not measured; ns.
_COSTS = Costs(move=0.0012, tap=0.00003, dense=0.0001, row_fft=0.0003, column_fft=0.0007, coarse_fft=0.0008)

_CACHED_TABLES = 64
_CACHED_FILTERS = 256


@dataclass(frozen=True)
class _Prepared:
    """A native filter and the device memory it points into; no filter where the gain is the background throughout."""

    native: Any
    tables: tuple[torch.Tensor, ...]
    sizes: dict[int, int] = field(default_factory=dict)  #: bytes of workspace by number of matrices, 0 for any number
    streams: set[int] = field(default_factory=set)  #: those whose work the tables' memory waits for when it is freed

    def workspace(self, count: int, stream: Stream) -> int:
        size = self.sizes.get(count)
        if size is None:
            size = self.sizes[count] = self.native.workspace(count, stream.device, stream.handle)
        return size


class CudaBackend:
    """Runs decimated, pruned and full plans in fp32, bf16 and fp16, on the current stream, without waiting for it.

    After one call with the same shapes, calls can be recorded in a CUDA graph.
    """

    name = "cuda"

    def __init__(self, runtime: Runtime = RUNTIME) -> None:
        self._runtime = runtime
        self._tables: Cache[object, tuple[torch.Tensor, ...]] = Cache(_CACHED_TABLES)
        self._filters: Cache[Plan, _Prepared] = Cache(_CACHED_FILTERS)

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
            transposes=True,
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
            if axis is not None and not 2 <= axis.taps <= _MAX_TAPS:
                return f"has no windows of {axis.taps} taps"
        return None

    def workspace_bytes(self, plan: Plan) -> int:
        """Device memory that :meth:`run` takes beside the matrices, at most, for any number of them."""
        stream = self._runtime.stream(torch.device(plan.device))
        prepared = self._prepared(plan, stream)
        return prepared.workspace(0, stream) if prepared.native is not None else 0

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
        needed = prepared.workspace(len(pointers), stream)
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
        if plan.form == "decimated":
            assert plan.rows is not None
            assert plan.columns is not None
            height, width = plan.matrix
            rows, row_tables = self._window(height, plan.rows, plan.device)
            columns, column_tables = self._window(width, plan.columns, plan.device)
            mask = plan.response.params(plan.shape)
            native = self._runtime.module.Filter.decimated(mask, code, plan.background, rows, columns)
            return _Prepared(native, row_tables + column_tables)
        columns, background = columns_to_transform(plan)
        if not columns.size:
            return _Prepared(None, ())
        place = np.full((plan.matrix[0] if plan.transposed else plan.matrix[1]) // 2 + 1, -1, dtype=np.int32)
        place[columns] = np.arange(columns.size)
        bins, places = _upload(columns, plan.device), _upload(place, plan.device)
        mask, tables = self._mask(plan.response, plan.shape, plan.device)
        native = self._runtime.module.Filter.by_columns(
            mask, tables[0].data_ptr() if tables else 0, code, background, plan.transposed,
            bins.data_ptr(), places.data_ptr(), columns.size,
        )  # fmt: skip
        return _Prepared(native, (bins, places, *tables))

    def _window(self, n: int, d: Decimation, device: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
        module, window = self._runtime.module, (n, d.cells, d.taps, d.band, d.nyquist)
        tables = self._tables.get(
            (window, device),
            lambda: tuple(_upload(array, device) for array in module.window_tables(*window)),
        )
        return module.Window(*window, *(table.data_ptr() for table in tables)), tables

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
        return MaskParams(_TABLE_MASK, height, width), tables


def columns_to_transform(plan: Plan) -> tuple[npt.NDArray[np.int32], float]:
    """The columns of the half spectrum that a pruned or full plan transforms, and the gain of the others."""
    height, width = plan.matrix
    if plan.form == "full":
        return np.arange((height if plan.transposed else width) // 2 + 1, dtype=np.int32), 0.0
    response, shape = plan.response, plan.shape
    if plan.transposed:
        response, shape = transposed(response), (shape[-1], shape[-2])
    (varying,) = np.nonzero(response.column_gains(shape) != plan.background)
    return varying.astype(np.int32), plan.background


def _upload(array: npt.NDArray[Any], device: str) -> torch.Tensor:
    # Waits for the copy, so that any stream may read the table afterwards.
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, copy=True)
