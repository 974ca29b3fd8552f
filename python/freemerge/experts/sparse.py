"""Sparse updates of dense tensors, in place and exactly undone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch

from .. import _core, cuda
from ..errors import ArgumentError
from ..native import dtype_code, runs_native


@dataclass(frozen=True, eq=False)
class SparseVector:
    """Entries of a flattened tensor: ``indices`` (int32 or int64, ascending) and ``values`` (float32)."""

    indices: torch.Tensor
    values: torch.Tensor

    def to(self, device: torch.device) -> SparseVector:
        """The same entries on a device."""
        return SparseVector(self.indices.to(device), self.values.to(device))


@dataclass(frozen=True, eq=False)
class Update:
    """A change of one tensor: ``weights[index] += scale * value``, or ``weights[index] = origin + scale * value``.

    ``entries`` index the flattened weights and lie on their device; ``origin``, if given, holds one value per entry in
    the dtype of the weights. Arithmetic is float32 (float64 for float64 weights), rounded once to the weights' dtype.
    """

    weights: torch.Tensor
    entries: SparseVector
    scale: float
    origin: torch.Tensor | None = None


def apply_(updates: Sequence[Update], *, backend: str = "auto") -> ExitStack:
    """Make the changes in place, in their order. Leaving or closing the stack puts back what was there, bit for bit.

    Tensors on the CPU go to the native kernel all at once. If one change cannot be made, none is.
    """
    with ExitStack() as undo:
        native = []
        for update in updates:
            device = update.weights.device
            if any(tensor.device != device for tensor in (update.entries.indices, update.entries.values)):
                raise ArgumentError(f"update must be on the device of the weights, {device}")
            if update.entries.indices.numel() == 0:
                continue
            if cuda.RUNTIME.runs(backend, (update.weights,)):
                _apply_on_device(update, undo)
            elif runs_native(backend, (update.weights, update.entries.indices)):
                native.append(update)
            else:
                _apply_in_torch(update, undo)
        if native:
            _apply_native(native, undo)
        return undo.pop_all()


def _apply_native(updates: Sequence[Update], undo: ExitStack) -> None:
    ends = list(accumulate(8 * update.entries.indices.numel() for update in updates))  # 8: as wide as any dtype
    saved = torch.empty(ends[-1], dtype=torch.uint8)
    memories, indices, jobs = [], [], []
    for update, end in zip(updates, ends, strict=True):
        memories.append(flat_memory(update.weights))
        indices.append(memory_indices(update.weights, update.entries.indices))
        jobs.append((
            memories[-1].data_ptr(), dtype_code(memories[-1], "weights"), memories[-1].numel(), *_pointer(indices[-1]),
            update.entries.values.data_ptr(), update.scale, _address(update.origin),
            saved.data_ptr() + end - 8 * indices[-1].numel(),
        ))  # fmt: skip

    def restore(*_: object) -> None:
        _core.sparse_restore(jobs, torch.get_num_threads())
        _mark_changed(memories)

    _core.sparse_apply(jobs, torch.get_num_threads())
    undo.callback(restore, saved, indices)  # the jobs hold their addresses
    _mark_changed(memories)


def _apply_on_device(update: Update, undo: ExitStack) -> None:
    memory, indices = flat_memory(update.weights), memory_indices(update.weights, update.entries.indices)
    saved = torch.empty(indices.numel(), dtype=memory.dtype, device=memory.device)
    where = memory.data_ptr(), dtype_code(memory, "weights"), *_pointer(indices)
    stream = cuda.RUNTIME.stream(memory.device)

    def restore() -> None:
        now = cuda.RUNTIME.stream(memory.device)
        cuda.RUNTIME.module.sparse_restore(*where, saved.data_ptr(), now.device, now.handle)
        _mark_changed([memory])

    cuda.RUNTIME.module.sparse_apply(
        *where, update.entries.values.data_ptr(), update.scale, _address(update.origin), saved.data_ptr(),
        stream.device, stream.handle,
    )  # fmt: skip
    undo.callback(restore)
    _mark_changed([memory])


def _apply_in_torch(update: Update, undo: ExitStack) -> None:
    memory, where = flat_memory(update.weights), memory_indices(update.weights, update.entries.indices).long()
    saved = memory[where]
    compute = torch.float64 if memory.dtype == torch.float64 else torch.float32
    start = saved if update.origin is None else update.origin
    changed = (start.to(compute) + update.entries.values.to(compute) * update.scale).to(memory.dtype)

    def restore() -> None:
        memory[where] = saved

    undo.callback(restore)
    memory[where] = changed


def weighted_sum(terms: Sequence[tuple[SparseVector, float]]) -> SparseVector:
    """``sum_j weight_j * values_j`` over the union of positions; terms are added in their order, in float32."""
    device = terms[0][0].indices.device
    on_cpu = [(term.to(torch.device("cpu")), weight) for term, weight in terms]
    indices, values = _core.sparse_sum(
        [(*_pointer(term.indices), term.values.data_ptr(), weight) for term, weight in on_cpu]
    )
    return SparseVector(torch.from_numpy(indices), torch.from_numpy(values)).to(device)


def flat_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's memory as a vector, whatever its strides; shares memory with it."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,))


def memory_indices(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Where the entries at flat (row-major) ``indices`` lie in :func:`flat_memory`."""
    if tensor.is_contiguous():
        return indices
    rest = indices.long()
    memory = torch.zeros_like(rest)
    for n, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        memory += rest % n * stride
        rest = torch.div(rest, n, rounding_mode="floor")
    return memory


def _mark_changed(memories: Sequence[torch.Tensor]) -> None:
    """Tell autograd of a native write, so that a backward pass through the former weights is an error, not a lie."""
    torch.autograd.graph.increment_version([memory for memory in memories if not memory.is_inference()])


def _pointer(indices: torch.Tensor) -> tuple[int, bool, int]:
    return indices.data_ptr(), indices.dtype == torch.int64, indices.numel()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
