"""Sparse updates of dense tensors, in place and exactly undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
class Undo:
    """What it takes to restore a tensor: the memory that was changed, where, and what was there."""

    memory: torch.Tensor
    indices: torch.Tensor
    saved: torch.Tensor
    backend: str

    def restore(self) -> None:
        """Put the former values back, bit for bit."""
        if self.indices.numel() and cuda.RUNTIME.runs(self.backend, (self.memory,)):
            stream = cuda.RUNTIME.stream(self.memory.device)
            cuda.RUNTIME.module.sparse_restore(
                self.memory.data_ptr(), dtype_code(self.memory, "weights"), *_pointer(self.indices),
                self.saved.data_ptr(), stream.device, stream.handle,
            )  # fmt: skip
            _mark_changed(self.memory)
        elif runs_native(self.backend, (self.memory,)):
            _core.sparse_restore(
                self.memory.data_ptr(), dtype_code(self.memory, "weights"), self.memory.numel(),
                *_pointer(self.indices), self.saved.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            _mark_changed(self.memory)
        else:
            self.memory[self.indices.long()] = self.saved


def apply_(
    weights: torch.Tensor,
    update: SparseVector,
    scale: float,
    *,
    origin: torch.Tensor | None = None,
    backend: str = "auto",
) -> Undo:
    """``weights[index] += scale * value`` in place, or with ``origin`` ``weights[index] = origin + scale * value``.

    ``update`` indexes the flattened weights and lies on their device; ``origin`` holds one value per entry, in the
    dtype of the weights. Arithmetic is float32 (float64 for float64 weights), rounded once to the weights' dtype.
    """
    memory = flat_memory(weights)
    if any(tensor.device != memory.device for tensor in (update.indices, update.values)):
        raise ArgumentError(f"update must be on the device of the weights, {memory.device}")
    indices = memory_indices(weights, update.indices)
    saved = torch.empty(indices.numel(), dtype=memory.dtype, device=memory.device)
    code = dtype_code(memory, "weights")
    if indices.numel() and cuda.RUNTIME.runs(backend, (memory,)):
        stream = cuda.RUNTIME.stream(memory.device)
        cuda.RUNTIME.module.sparse_apply(
            memory.data_ptr(), code, *_pointer(indices), update.values.data_ptr(), scale,
            origin.data_ptr() if origin is not None else 0, saved.data_ptr(), stream.device, stream.handle,
        )  # fmt: skip
        _mark_changed(memory)
    elif runs_native(backend, (memory, indices)):
        _core.sparse_apply(
            memory.data_ptr(), code, memory.numel(), *_pointer(indices), update.values.data_ptr(), scale,
            origin.data_ptr() if origin is not None else 0, saved.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        _mark_changed(memory)
    else:
        where = indices.long()
        saved.copy_(memory[where])
        compute = torch.float64 if memory.dtype == torch.float64 else torch.float32
        start = saved if origin is None else origin
        memory[where] = (start.to(compute) + update.values.to(compute) * scale).to(memory.dtype)
    return Undo(memory, indices, saved, backend)


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


def _mark_changed(memory: torch.Tensor) -> None:
    """Tell autograd of a native write, so that a backward pass through the former weights is an error, not a lie."""
    if not memory.is_inference():
        torch.autograd.graph.increment_version(memory)


def _pointer(indices: torch.Tensor) -> tuple[int, bool, int]:
    return indices.data_ptr(), indices.dtype == torch.int64, indices.numel()
