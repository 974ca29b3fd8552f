"""The CUDA backend: kernels and cuFFT behind the optional module ``freemerge._cuda``, on torch's streams and memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..cache import Cache, table_bytes
from ..dense import address
from ..errors import BackendError, CudaError
from ..planner.costs import Costs, Traits
from ..planner.plan import Form, Plan
from ..responses import MaskParams, has_closed_form
from .base import BackendInfo, Check, Entries, Executable, LateSum, unchecked
from .cuda_runtime import DTYPES, Runtime, Stream
from .memory import DTYPE_CODES, addresses, pointer
from .sparse import BackendSwitch, Scratch, Update, addresses_of, mark_changed, memory_of, moved, native_updates
from .torch_vectors import TorchVectors

_FORMS: frozenset[Form] = frozenset(("identity", "scale", "decimated", "full"))
_DTYPES = frozenset(DTYPES)
_MAX_TAPS = 12

# Fitted to benchmarks/gpu_suite.py on an H100: ns, on 13 shapes from 768 x 768 to 151936 x 896.
_COSTS = Costs(
    move=0.0024, tap=0.00008, row_fft=0.0001, column_fft=0.001, coarse_fft=0.0008, column_tap=0.00033,
    start=60_000.0,
)  # fmt: skip

_FILTER_BYTES = 1 << 19  # of a prepared filter itself, beside its tables
_CACHED_SIZES = 16
# The squares after a filter are known by Parseval to 4e-7 of those before it at worst, of a single wave (of themselves
# where there is no background, and in the full form), and their root to 1e-6 where so much is left of what the
# background keeps, and of all. Where gains are larger than the background, times the largest of them.
_LEAST_OF_KEPT, _LEAST_OF_ALL = 0.2, 1e-5
_TRANSFORMS = "FREEMERGE_CUDA_TRANSFORMS"
_FFT_ALIGNMENT = 8  # bytes of a complex number, to which cuFFT wants real ones aligned


class CudaBackend(TorchVectors):
    """Runs in fp32, bf16 and fp16, on the current stream; filters and updates do not wait for it.

    After one call with the same shapes, calls can be recorded in a CUDA graph.
    """

    name = "cuda"
    preference = 0

    def __init__(self, runtime: Runtime | None = None) -> None:
        self._runtime = Runtime() if runtime is None else runtime
        self._recorded: set[Executable] = set()
        self._traits: dict[torch.device, Traits | None] = {}

    def info(self) -> BackendInfo:
        reason, details = self._runtime.state
        return BackendInfo(self.name, not reason, reason, details)

    def device(self, stored: torch.device) -> torch.device:
        return stored if stored.type == self._runtime.device_type else torch.device(self._runtime.device_type)

    def takes(self, tensors: Sequence[torch.Tensor]) -> str | None:
        if not all(tensor.device.type == self._runtime.device_type and tensor.dtype in DTYPES for tensor in tensors):
            return "needs float32, bfloat16 or float16 tensors on a GPU"
        return next((self.refusal(x.device) for x in tensors if self.traits(x.device) is None), None)

    # --- filter -------------------------------------------------------------------------------------------------------

    def traits(self, device: torch.device) -> Traits | None:
        if device.type != self._runtime.device_type:
            return None
        if device not in self._traits:  # looked up at every call
            self._traits[device] = self._traits_of(device) if self._has_code_for(device) else None
        return self._traits[device]

    def _traits_of(self, device: torch.device) -> Traits:
        fused_length, fused_prime = self._fused_columns(device)
        available = self.info().available
        return Traits(
            forms=_FORMS,
            dtypes=_DTYPES,
            costs=_COSTS,
            taps=(8, 10, _MAX_TAPS),
            whole_columns=True,
            half_bins=2,  # as the odd bins of a grid and as many rows of zeros: real transforms have whole bins only
            streams=True,
            fused_length=fused_length,
            fused_prime=fused_prime,
            block_bytes=self._runtime.module.block_bytes(*self._runtime.place(device)) if available else 0,
            own_transforms=_own_transforms(),
            chirp_cost=8.0,  # fitted to matrices of 50257, 151936 and 1009 rows
            workspace=self._workspace_bytes,
            centers={"decimated": _DTYPES},
        )

    def refusal(self, device: torch.device) -> str:
        return (
            f"has no code for the GPU {device}" if device.type == self._runtime.device_type else super().refusal(device)
        )

    def _has_code_for(self, device: torch.device) -> bool:
        """False for one of several GPUs; if it has code for none, or cannot run at all, :meth:`info` says so."""
        return not self.info().available or self._runtime.covers(device)

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

    def prepare(self, plan: Plan) -> Executable:
        self.require()
        stream = self._runtime.stream(torch.device(plan.device))
        if stream.capturing:
            raise BackendError("backend cuda cannot upload tables while a graph is recorded; run the same call before")
        tables: list[torch.Tensor] = []

        def upload(values: npt.NDArray[Any]) -> int:
            # Waits for the copy, so that any stream may read the table afterwards.
            tables.append(torch.from_numpy(values).to(plan.device, copy=True))
            return address(tables[-1])

        if has_closed_form(plan.response):
            mask, gains = plan.response.params(plan.shape), 0
        else:
            table = np.ascontiguousarray(plan.response.half_mask(plan.shape), dtype=np.float32)
            mask, gains = MaskParams("table", *plan.matrix), upload(table)
        native = self._runtime.module.Filter(
            form=plan.form, mask=mask, table=gains, dtype=DTYPE_CODES[plan.dtype], background=plan.background,
            rows=plan.rows, columns=plan.columns, fused=plan.fused, tiles=plan.tiles,
            column_gains=plan.column_gains if plan.form == "full" and (plan.fused or plan.tiles) else (),
            upload=upload,
        )  # fmt: skip
        return _Filter(self._runtime, native, tables, self._recorded)

    def _fused_columns(self, device: torch.device) -> tuple[int, int]:
        """The longest column that the fused kernel takes, and its largest prime factor; 0 where nothing can run."""
        if not self.info().available:
            return 0, 1
        module = self._runtime.module
        return module.longest_column(*self._runtime.place(device)), module.LARGEST_COLUMN_PRIME

    def _workspace_bytes(self, plan: Plan) -> int:
        if plan.form in ("identity", "scale"):
            return 0
        executable = self.executable(plan)
        assert isinstance(executable, _Filter)
        return executable.workspace([], [], [], self._runtime.stream(torch.device(plan.device)))

    # --- vectors ------------------------------------------------------------------------------------------------------

    def weighted_sum(
        self,
        base: torch.Tensor,
        models: Sequence[torch.Tensor],
        weights: Sequence[float] | None,
        out: torch.Tensor | None,
    ) -> list[float]:
        n = base.numel()
        if not n:
            return [0.0] * len(models)
        module, stream = self._runtime.module, self._runtime.stream(base.device)
        scratch = torch.empty(module.accumulate_scratch(n, len(models)), dtype=torch.float64, device=base.device)
        means = torch.empty(len(models), dtype=torch.float64, device=base.device)
        module.accumulate(
            0 if out is None else address(out), *pointer(base), [address(model) for model in models],
            [DTYPE_CODES[model.dtype] for model in models], list(weights or ()), n, address(means),
            address(scratch), stream.device, stream.handle,
        )  # fmt: skip
        result: list[float] = means.tolist()
        return result

    def filtered_sum(
        self,
        plan: Plan,
        base: torch.Tensor,
        models: Sequence[torch.Tensor],
        weights: Sequence[float],
        out: torch.Tensor,
        check: Check = unchecked,
    ) -> tuple[list[float], float, float, torch.Tensor | LateSum] | None:
        alone = math.prod(out.shape[:-2]) == 1 and len(models) <= self._runtime.module.MODELS_PER_LAUNCH
        ours = plan.form == "decimated" or plan.tiles is not None  # cuFFT reads its matrix from memory
        if not ours or not alone:
            return None
        executable = self.executable(plan)
        assert isinstance(executable, _Filter)
        late = _LateSum(self._runtime, executable, base, models, weights, out)
        *means, before, last = late.results.tolist()
        check(means)
        kept = plan.background**2 * before if plan.form == "decimated" else 0.0  # beside what the mask finds
        after = kept + last
        if math.isfinite(after) and after >= _LEAST_OF_KEPT * kept + _LEAST_OF_ALL * before:
            return means, before, after, late
        # A difference of large numbers, if they are any; or squares of gains that float32 does not hold.
        return means, before, self.square_sum(late.tensor), out

    def add_round(
        self, out: torch.Tensor, base: torch.Tensor, delta: torch.Tensor, scale: float, factor: float
    ) -> bool | None:
        if out.numel():
            stream = self._runtime.stream(base.device)
            self._runtime.module.add_round(
                *pointer(out), *pointer(base), *pointer(delta), scale, factor, out.numel(), stream.device, stream.handle
            )
        return None

    def select_largest(self, model: torch.Tensor, base: torch.Tensor, rows: int, width: int, k: int) -> Entries:
        k = min(k, width)
        if not (rows and k):
            return torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, dtype=torch.float32, device="cpu")
        module, device, stream = self._runtime.module, model.device, self._runtime.stream(model.device)
        indices = torch.empty(rows, k, dtype=torch.int64, device=device)
        values = torch.empty(rows, k, dtype=torch.float32, device=device)
        counts = torch.empty(rows, 1, dtype=torch.int64, device=device)
        scratch = torch.empty(module.select_scratch(rows, width), dtype=torch.uint8, device=device)
        module.select(
            *pointer(model), *pointer(base), rows, width, k, address(indices), address(values),
            address(counts), address(scratch), stream.device, stream.handle,
        )  # fmt: skip
        kept = torch.arange(k, device=device) < counts
        return indices[kept].cpu(), values[kept].cpu()

    def switch(self, updates: Sequence[Update]) -> BackendSwitch:
        return _Switch(self._runtime, updates)


class _Filter(Executable):
    """A native filter and the device memory it points into."""

    def __init__(self, runtime: Runtime, native: Any, tables: list[torch.Tensor], recorded: set[Executable]) -> None:
        self._runtime, self.native, self._tables, self._recorded = runtime, native, tables, recorded
        self._sizes: Cache[tuple[int, ...], int] = Cache(_CACHED_SIZES)
        self._streams: set[int] = set()  # those whose work the tables' memory waits for when it is freed
        self.nbytes = _FILTER_BYTES + table_bytes(tables)

    def workspace(
        self, batches: Sequence[torch.Tensor], pointers: list[int], strides: list[int], stream: Stream
    ) -> int:
        """Bytes of workspace for these matrices, which depend on their strides and alignment, as cuFFT's plans do; or
        the most that any need, if there are none."""

        def ask() -> int:
            return int(self.native.workspace_bytes(pointers, strides, stream.device, stream.handle))

        if len(batches) != 1:
            return ask()
        (batch,) = batches
        return self._sizes.get((address(batch) % _FFT_ALIGNMENT, batch.shape[0], *batch.stride()), ask)

    def run(self, batches: Sequence[torch.Tensor], scale: float) -> None:
        if not batches:
            return
        device = batches[0].device
        stream = self._runtime.stream(device)
        pointers, strides = addresses(batches)
        needed = self.workspace(batches, pointers, strides, stream)
        self._run(pointers, strides, scale, needed, device, stream)

    def _run(
        self, pointers: list[int], strides: list[int], scale: float, needed: int, device: torch.device, stream: Stream
    ) -> None:
        if stream.capturing:
            self._recorded.add(self)  # the graph keeps addresses of its tables
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)
        self.native.run(pointers, strides, scale, address(workspace), needed, stream.device, stream.handle)
        self.keep_for(device, stream)

    def keep_for(self, device: torch.device, stream: Stream) -> None:
        """Let the tables' memory wait for a stream when it is freed."""
        if stream.handle not in self._streams and self._runtime.device_type == "cuda":
            # A table dropped from the cache must not be reused before this stream is done with it.
            current = torch.cuda.current_stream(device)
            for table in self._tables:
                table.record_stream(current)
            self._streams.add(stream.handle)


class _LateSum(LateSum):
    """A sum of one matrix by a filter whose first pass is no cuFFT, run up to the last. ``results``: see SumFirst in
    csrc/cuda/task_vectors.h."""

    def __init__(
        self, runtime: Runtime, executable: _Filter,
        base: torch.Tensor, models: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor,
    ) -> None:  # fmt: skip
        super().__init__(out)
        self._runtime, self._filter = runtime, executable
        self.results = torch.empty(len(models) + 2, dtype=torch.float64, device=out.device)
        self._job = runtime.module.SumFirst(
            *pointer(base), [address(model) for model in models], [DTYPE_CODES[model.dtype] for model in models],
            list(weights), base.numel(), address(self.results),
        )  # fmt: skip
        self._matrix = addresses([out.view(out.shape[-2:])])
        self._stream = stream = runtime.stream(out.device)
        native, where = executable.native, (stream.device, stream.handle)
        nbytes = int(native.workspace_bytes(*self._matrix, *where, self._job))
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=out.device)
        native.run(*self._matrix, 1.0, address(workspace), nbytes, *where, self._job)
        self._workspace: torch.Tensor | None = workspace
        executable.keep_for(out.device, stream)

    def _finish(self) -> None:
        # Whoever holds the sum from now on does not need it, and a pass in place that is cut off must not run again.
        workspace, self._workspace = self._workspace, None
        self._run_last(workspace, None)

    def _add_round(self, out: torch.Tensor, base: torch.Tensor, scale: float, factor: float) -> bool:
        job = self._runtime.module.AddLast(*pointer(out), *pointer(base), out.numel(), scale, factor)
        if not self._filter.native.adds(job):
            return False
        self._run_last(self._workspace, job)
        return True

    def _run_last(self, workspace: torch.Tensor | None, add: Any) -> None:
        if workspace is None:
            raise BackendError("backend cuda: the last pass of this sum was interrupted")
        # All before has been waited for, by whoever has looked at the results.
        stream = self._runtime.stream(self.device)
        self._filter.native.run_last(
            *self._matrix, address(workspace), workspace.nbytes,
            stream.device, stream.handle, self._job, add,
        )  # fmt: skip
        self._filter.keep_for(self.device, stream)
        if stream.handle != self._stream.handle:  # freed memory goes back to the stream that it was taken on
            for tensor in (self._memory, workspace):
                tensor.record_stream(torch.cuda.current_stream(self.device))


class _Switch(BackendSwitch):
    def __init__(self, runtime: Runtime, updates: Sequence[Update]) -> None:
        self._jobs, self._kept = native_updates(updates)
        self._device = updates[0].weights.device
        self._runtime = runtime
        self._switch = runtime.module.SparseSwitch(self._jobs)
        self._streams: set[tuple[int, int]] = set()  # those whose work freed memory of the jobs waits for

    def on(self, weights: Sequence[torch.Tensor], scratch: Scratch) -> Callable[[], None]:
        place = self._runtime.place(self._device)
        saved = torch.empty(self._switch.saved_bytes, dtype=torch.uint8, device=self._device)  # the allocator's scratch
        memory = memory_of(weights)
        then = addresses_of(memory)
        self._keep_for(place)

        def restore() -> None:
            now = self._runtime.place(self._device)
            here = addresses_of(memory) == then
            switch = self._switch if here else self._runtime.module.SparseSwitch(moved(self._jobs, memory))
            self._keep_for(now)
            if now != place:  # freed memory goes back to the stream that it was taken on
                saved.record_stream(torch.cuda.current_stream(self._device))
            switch.restore(address(saved), *now)
            mark_changed(weights)

        former = address(saved)
        try:
            self._switch.apply(former, *place)
            mark_changed(weights)
        except CudaError:  # a launch failed: the native code has restored what was changed before it
            raise
        except BaseException:  # of a signal: Python tells of it when the native code is through
            restore()
            raise
        return restore

    def wait(self) -> None:
        if self._runtime.device_type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _keep_for(self, place: tuple[int, int]) -> None:
        if place not in self._streams and self._runtime.device_type == "cuda":
            for tensor in self._kept:
                tensor.record_stream(torch.cuda.current_stream(self._device))
            self._streams.add(place)


def _own_transforms() -> bool:
    """Whether the full form and coarse grids are to run in three kernels of ours where they can, not on cuFFT."""
    choice = os.environ.get(_TRANSFORMS, "cufft")
    if choice not in ("cufft", "own"):
        raise BackendError(f"{_TRANSFORMS} must be cufft or own, not {choice!r}")
    return choice == "own"
