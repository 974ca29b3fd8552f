"""The CUDA backend: kernels and cuFFT behind the optional module ``freemerge._cuda``, on torch's streams and memory."""

from __future__ import annotations

import atexit
import importlib
import sysconfig
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from ..errors import BackendError, CudaError
from ..native import DTYPE_CODES
from ..responses import MaskParams, Response, matrix_shape, transposed
from .backend import BackendInfo, Costs, Traits
from .plan import Decimation, Form, Plan

_FORMS: frozenset[Form] = frozenset(("identity", "scale", "decimated", "pruned", "full"))
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_MAX_TAPS = 12
_TABLE_MASK = 5  # MaskKind::kTable

# From the traffic model of an H100 (3.35 TB/s of memory, 5.5 TB/s of L2, 60 Tflop/s), not measured; ns.
_COSTS = Costs(move=0.0012, tap=0.00003, dense=0.0001, row_fft=0.0003, column_fft=0.0007, coarse_fft=0.0008)

_CACHED_TABLES = 64
_CACHED_FILTERS = 256

Key = TypeVar("Key")
Value = TypeVar("Value")


class _Cache(Generic[Key, Value]):
    """The most recently used values, and for ever those that a recorded CUDA graph refers to."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._lock = capacity, Lock()
        self._entries: OrderedDict[Key, Value] = OrderedDict()
        self._pinned: dict[Key, Value] = {}

    def get(self, key: Key, make: Callable[[], Value], *, pin: bool) -> Value:
        with self._lock:
            value = self._pinned.get(key, self._entries.get(key))
        if value is None:
            value = make()
        with self._lock:
            if pin:
                self._pinned[key] = value
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        return value


@dataclass(frozen=True)
class _Stream:
    """Where a call works: a device index and the handle of its current stream."""

    device: int
    handle: int
    capturing: bool


@dataclass(frozen=True)
class _Prepared:
    """A native filter and the device memory it points into."""

    native: Any
    tables: tuple[torch.Tensor, ...]


class CudaBackend:
    """Runs decimated, pruned and full plans in fp32, bf16 and fp16, on the current stream, without waiting for it.

    After one call with the same shapes, calls can be recorded in a CUDA graph. ``module`` and ``device_type`` exist for
    tests, which run the same sources on the CPU.
    """

    name = "cuda"

    def __init__(self, module: ModuleType | None = None, device_type: str = "cuda") -> None:
        self._given = module
        self._device_type = device_type
        self._tables: _Cache[object, tuple[torch.Tensor, ...]] = _Cache(_CACHED_TABLES)
        self._filters: _Cache[Plan, _Prepared] = _Cache(_CACHED_FILTERS)

    def info(self) -> BackendInfo:
        return self._info

    def traits(self, device: torch.device) -> Traits | None:
        if device.type != self._device_type:
            return None
        return Traits(
            forms=_FORMS,
            dtypes=_DTYPES,
            costs=_COSTS,
            taps=(8, 10, _MAX_TAPS),
            transposes=True,
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
        if plan.form in ("identity", "scale"):
            return 0
        return self._workspace(plan, 0)

    def run(self, plan: Plan, matrices: Sequence[torch.Tensor], scale: float) -> None:
        if plan.form in ("identity", "scale"):
            factor = scale * plan.background
            for x in matrices if factor != 1.0 else ():
                x.mul_(factor) if factor else x.zero_()
            return
        if not matrices:
            return
        stream = self._stream(plan.device)
        prepared = self._prepared(plan, stream)
        needed = self._workspace(plan, len(matrices))
        workspace = torch.empty(needed, dtype=torch.uint8, device=plan.device)
        prepared.native.run(
            [x.data_ptr() for x in matrices], [x.stride(0) for x in matrices], scale,
            workspace.data_ptr(), needed, stream.device, stream.handle,
        )  # fmt: skip
        if self._device_type == "cuda":
            # A table dropped from the cache must not be reused before this stream is done with it.
            current = torch.cuda.current_stream(stream.device)
            for table in prepared.tables:
                table.record_stream(current)

    # --- availability ---------------------------------------------------------------------------------------------

    @cached_property
    def _module(self) -> ModuleType:
        return self._given if self._given is not None else importlib.import_module("freemerge._cuda")

    @cached_property
    def _info(self) -> BackendInfo:
        details: dict[str, str] = {}
        return BackendInfo(self.name, not (reason := self._unavailable(details)), reason, details)

    def _unavailable(self, details: dict[str, str]) -> str:
        """Why the backend cannot run here and what would help, or nothing."""
        try:
            module = self._module
        except ImportError as error:
            if not isinstance(error, ModuleNotFoundError):
                return f"its extension module cannot be loaded: {error}"
            return (
                "this freemerge was built without CUDA; install the CUDA toolkit (nvcc), then reinstall freemerge from "
                "source with FREEMERGE_CUDA=ON in the environment"
            )
        if self._device_type == "cuda" and torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
        try:
            count = module.device_count()
        except CudaError as error:
            return f"no usable GPU or driver: {error}"
        if count == 0:
            return "the driver reports no GPU; CUDA_VISIBLE_DEVICES may hide it"
        if self._device_type == "cuda" and not torch.cuda.is_available():
            return "torch.cuda.is_available() is False although the driver reports a GPU; torch may need a newer driver"
        try:
            path, version = module.open_cufft([str(file) for file in _cufft_candidates()])
        except CudaError as error:
            wheel = "nvidia-cufft-cu12" if (torch.version.cuda or "13").startswith("12") else "nvidia-cufft"
            return f"cuFFT is missing: pip install {wheel}, or name the library in FREEMERGE_CUFFT ({error})"
        details |= {"devices": str(count), "cufft": path, "cufft version": str(version)}
        if self._device_type == "cuda":
            details["device 0"] = torch.cuda.get_device_name(0)
        atexit.register(module.clear_fft_cache)  # while the driver is still there
        return ""

    # --- executing a plan -----------------------------------------------------------------------------------------

    def _stream(self, device: str) -> _Stream:
        if self._device_type != "cuda":
            return _Stream(0, 0, False)
        index = torch.device(device).index
        index = torch.cuda.current_device() if index is None else index
        return _Stream(index, torch.cuda.current_stream(index).cuda_stream, torch.cuda.is_current_stream_capturing())

    def _workspace(self, plan: Plan, count: int) -> int:
        stream = self._stream(plan.device)
        bytes_needed: int = self._prepared(plan, stream).native.workspace(count, stream.device, stream.handle)
        return bytes_needed

    def _prepared(self, plan: Plan, stream: _Stream) -> _Prepared:
        if not self._info.available:
            raise BackendError(f"backend cuda is not available: {self._info.reason}")
        return self._filters.get(plan, lambda: self._prepare(plan, stream), pin=stream.capturing)

    def _prepare(self, plan: Plan, stream: _Stream) -> _Prepared:
        code = DTYPE_CODES[plan.dtype]
        if plan.form == "decimated":
            assert plan.rows is not None and plan.columns is not None
            height, width = plan.matrix
            rows, row_tables = self._window(height, plan.rows, plan.device, stream)
            columns, column_tables = self._window(width, plan.columns, plan.device, stream)
            mask = plan.response.params(plan.shape)
            native = self._module.Filter.decimated(mask, code, plan.background, rows, columns)
            return _Prepared(native, row_tables + column_tables)
        begin, count, background = columns_to_transform(plan)
        mask, tables = self._mask(plan.response, plan.shape, plan.device, stream)
        address = tables[0].data_ptr() if tables else 0
        native = self._module.Filter.by_columns(mask, address, code, background, plan.transposed, begin, count)
        return _Prepared(native, tables)

    def _window(self, n: int, d: Decimation, device: str, stream: _Stream) -> tuple[Any, tuple[torch.Tensor, ...]]:
        native = self._module.Decimation(d.cells, d.taps, d.band, d.nyquist)
        tables = self._tables.get(
            (n, d, device),
            lambda: tuple(_upload(array, device) for array in self._module.window_tables(n, native)),
            pin=stream.capturing,
        )
        return self._module.Window(n, native, *(table.data_ptr() for table in tables)), tables

    def _mask(
        self, response: Response, shape: tuple[int, ...], device: str, stream: _Stream
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
            pin=stream.capturing,
        )
        return MaskParams(_TABLE_MASK, height, width), tables


def columns_to_transform(plan: Plan) -> tuple[int, int, float]:
    """First column and number of columns of the half spectrum that a pruned or full plan transforms, and the gain of
    the others."""
    height, width = plan.matrix
    if plan.form == "full":
        return 0, (height if plan.transposed else width) // 2 + 1, 0.0
    return _varying_columns(plan.response, plan.shape, plan.transposed, plan.background)


@lru_cache(maxsize=_CACHED_FILTERS)
def _varying_columns(
    response: Response, shape: tuple[int, ...], transpose: bool, background: float
) -> tuple[int, int, float]:
    if transpose:
        response, shape = transposed(response), (shape[-1], shape[-2])
    (varying,) = np.nonzero(response.column_gains(shape) != background)
    return int(varying[0]), int(varying[-1] - varying[0]) + 1, background


def _upload(array: np.ndarray, device: str) -> torch.Tensor:
    # Waits for the copy, so that any stream may read the table afterwards.
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, copy=True)


def _cufft_candidates() -> list[Path]:
    """cuFFT as the wheels of NVIDIA install it: for CUDA 13, and for CUDA 12."""
    roots = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    folders = [root / "nvidia" / folder / "lib" for root in roots for folder in ("cu13", "cufft")]
    return [file for folder in folders for file in sorted(folder.glob("libcufft.so.*"))]
