"""Sparse updates of dense tensors, in place and exactly undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .. import _core
from ..backends import cuda_runtime
from ..backends.native import dtype_code, runs_native
from ..errors import ArgumentError

_Job = tuple[int, int, int, int, bool, int, int, float, int]  # of csrc/bindings/sparse_updates.h


@dataclass(frozen=True, eq=False)
class SparseVector:
    """Entries of a flattened tensor: ``indices`` (int32 or int64, ascending) and ``values`` (float32)."""

    indices: torch.Tensor
    values: torch.Tensor
    _places: dict[tuple[object, ...], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest index; (0, -1) if there is none. A device is waited for, the first time only."""
        if not self.indices.numel():
            return 0, -1
        least, most = torch.stack(torch.aminmax(self.indices)).tolist()
        return least, most

    def places(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where the entries lie in :func:`flat_memory` of a tensor; kept for the next tensor with these strides."""
        if tensor.is_contiguous():
            return self.indices
        layout = tensor.shape, tensor.stride()
        if layout not in self._places:
            self._places.clear()
            self._places[layout] = memory_indices(tensor, self.indices)
        return self._places[layout]

    def to(self, device: torch.device) -> SparseVector:
        """The same entries on a device."""
        moved = SparseVector(self.indices.to(device), self.values.to(device))
        moved.__dict__["bounds"] = self.bounds
        return moved


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


class Scratch:
    """CPU memory for former weights, handed from one switch to the next: fresh pages would cost a tenth of a switch.

    Not for several threads at once.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """At least so many bytes, until they are given back."""
        kept = self._free.pop() if self._free else None
        return kept if kept is not None and kept.numel() >= nbytes else torch.empty(nbytes, dtype=torch.uint8)

    def give(self, memory: torch.Tensor) -> None:
        """Offer memory that :meth:`take` handed out to the next that asks."""
        self._free.append(memory)


class Switch:
    """Updates made ready to be turned on and off many times: checked, indexed and addressed once.

    It keeps entries and origins, but of the weights only where they lie: :meth:`fits` says whether tensors still lie
    there. Raises ArgumentError if an update cannot be made. Each device's tensors are changed in one native call.
    """

    def __init__(self, updates: Sequence[Update], *, backend: str = "auto", scratch: Scratch | None = None) -> None:
        self._layouts = [_layout(update.weights) for update in updates]
        self._scratch = Scratch() if scratch is None else scratch
        groups: dict[tuple[type[_Part], torch.device], list[int]] = {}
        for i, update in enumerate(updates):
            _check(update)
            if update.entries.indices.numel():
                groups.setdefault((_part(update, backend), update.weights.device), []).append(i)
        self._parts = [(kind([updates[i] for i in members]), members) for (kind, _), members in groups.items()]

    def fits(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether tensors are, in their order, where and what those of the updates were."""
        return self._layouts == [_layout(tensor) for tensor in weights]

    def on(self, weights: Sequence[torch.Tensor]) -> ExitStack:
        """Change ``weights``, which must fit, in place; closing the stack puts back what was there, bit for bit.

        If one change cannot be made, none is.
        """
        with ExitStack() as undo:
            for part, members in self._parts:
                undo.callback(part.on([weights[i] for i in members], self._scratch))
            return undo.pop_all()


def apply_(updates: Sequence[Update], *, backend: str = "auto") -> ExitStack:
    """Make the changes in place, in their order. Leaving or closing the stack puts back what was there, bit for bit.

    If one change cannot be made, none is.
    """
    return Switch(updates, backend=backend).on([update.weights for update in updates])


class _Part(ABC):
    """Updates on one device, by one kind of kernel."""

    @abstractmethod
    def __init__(self, updates: Sequence[Update]) -> None:
        """Look up, check and convert whatever the changes need."""

    @abstractmethod
    def on(self, weights: Sequence[torch.Tensor], scratch: Scratch) -> Callable[[], None]:
        """Make the changes; the result undoes them."""


class _NativePart(_Part):
    def __init__(self, updates: Sequence[Update]) -> None:
        jobs, self._kept = _jobs(updates)
        self._switch = _core.SparseSwitch(jobs)

    def on(self, weights: Sequence[torch.Tensor], scratch: Scratch) -> Callable[[], None]:
        saved = scratch.take(self._switch.saved_bytes)
        memory = _storages(weights)
        self._switch.apply(saved.data_ptr(), torch.get_num_threads())
        _mark_changed(weights)

        def restore(_: object = memory) -> None:
            self._switch.restore(saved.data_ptr(), torch.get_num_threads())
            _mark_changed(weights)
            scratch.give(saved)

        return restore


class _DevicePart(_Part):
    def __init__(self, updates: Sequence[Update]) -> None:
        jobs, self._kept = _jobs(updates)
        self._device = updates[0].weights.device
        self._runtime = cuda_runtime.RUNTIME
        self._switch = self._runtime.module.SparseSwitch(jobs)
        self._streams: set[tuple[int, int]] = set()  # those whose work freed memory of the jobs waits for

    def _keep_for(self, place: tuple[int, int]) -> None:
        if place not in self._streams and self._runtime.device_type == "cuda":
            for tensor in self._kept:
                tensor.record_stream(torch.cuda.current_stream(self._device))
            self._streams.add(place)

    def on(self, weights: Sequence[torch.Tensor], scratch: Scratch) -> Callable[[], None]:
        place = self._runtime.place(self._device)
        saved = torch.empty(self._switch.saved_bytes, dtype=torch.uint8, device=self._device)  # the allocator's scratch
        memory = _storages(weights)
        self._keep_for(place)
        self._switch.apply(saved.data_ptr(), *place)
        _mark_changed(weights)

        def restore(_: object = memory) -> None:
            now = self._runtime.place(self._device)
            self._keep_for(now)
            if now != place:  # freed memory goes back to the stream that it was taken on
                saved.record_stream(torch.cuda.current_stream(self._device))
            self._switch.restore(saved.data_ptr(), *now)
            _mark_changed(weights)

        return restore


class _TorchPart(_Part):
    def __init__(self, updates: Sequence[Update]) -> None:
        self._updates = [
            (update.entries.places(update.weights).long(), update.entries.values, update.scale, update.origin)
            for update in updates
        ]

    def on(self, weights: Sequence[torch.Tensor], scratch: Scratch) -> Callable[[], None]:
        with ExitStack() as undo:
            for tensor, (where, values, scale, origin) in zip(weights, self._updates, strict=True):
                memory = flat_memory(tensor)
                saved = memory[where]
                compute = torch.float64 if memory.dtype == torch.float64 else torch.float32
                start = saved if origin is None else origin
                changed = (start.to(compute) + values.to(compute) * scale).to(memory.dtype)
                undo.callback(memory.__setitem__, where, saved)
                memory[where] = changed
            return undo.pop_all().close


def _part(update: Update, backend: str) -> type[_Part]:
    if cuda_runtime.RUNTIME.runs(backend, (update.weights,)):
        return _DevicePart
    return _NativePart if runs_native(backend, (update.weights, update.entries.indices)) else _TorchPart


def _check(update: Update) -> None:
    """Kernels trust what they are given: refuse what would read or write outside of a tensor."""
    weights, entries = update.weights, update.entries
    parts = [entries.indices, entries.values] + ([] if update.origin is None else [update.origin])
    if any(tensor.device != weights.device for tensor in parts):
        raise ArgumentError(f"update must be on the device of the weights, {weights.device}")
    if any(tensor.shape != (entries.indices.numel(),) or not tensor.is_contiguous() for tensor in parts):
        raise ArgumentError("update must hold contiguous vectors of one length")
    if entries.indices.dtype not in (torch.int32, torch.int64) or entries.values.dtype != torch.float32:
        raise ArgumentError(
            f"update must hold int32 or int64 indices and float32 values, "
            f"not {entries.indices.dtype} and {entries.values.dtype}"
        )
    if update.origin is not None and update.origin.dtype != weights.dtype:
        raise ArgumentError(f"update has an origin of {update.origin.dtype} for weights of {weights.dtype}")
    least, most = entries.bounds
    if least < 0 or most >= weights.numel():
        raise ArgumentError(f"update has an index outside the tensor: {least} to {most} of {weights.numel()} entries")


def _jobs(updates: Sequence[Update]) -> tuple[list[_Job], list[torch.Tensor]]:
    """What a native switch is made of, and the tensors whose addresses that holds."""
    jobs, kept = [], []
    for update in updates:
        memory, indices = flat_memory(update.weights), update.entries.places(update.weights)
        jobs.append((
            memory.data_ptr(), dtype_code(memory, "weights"), memory.numel(), *_pointer(indices),
            update.entries.values.data_ptr(), update.scale, _address(update.origin),
        ))  # fmt: skip
        kept += [indices, update.entries.values] + ([] if update.origin is None else [update.origin])
    return jobs, kept


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


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
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((_extent(tensor),), (1,))


def memory_indices(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Where the entries at flat (row-major) ``indices`` lie in :func:`flat_memory`, in int32 if that is enough."""
    if tensor.is_contiguous():
        return indices
    rest = indices.long()
    memory = torch.zeros_like(rest)
    for n, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        memory += rest % n * stride
        rest = torch.div(rest, n, rounding_mode="floor")
    return memory.to(torch.int32) if _extent(tensor) <= 1 << 31 else memory


def _extent(tensor: torch.Tensor) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _storages(weights: Sequence[torch.Tensor]) -> list[torch.UntypedStorage]:
    """What keeps the memory of weights until they are restored, even if a tensor is given other data meanwhile."""
    return [tensor.untyped_storage() for tensor in weights]


def _mark_changed(changed: Sequence[torch.Tensor]) -> None:
    """Tell autograd of a native write, so that a backward pass through the former weights is an error, not a lie."""
    for tensor in changed:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)  # torch 2.4 takes no list


def _pointer(indices: torch.Tensor) -> tuple[int, bool, int]:
    return indices.data_ptr(), indices.dtype == torch.int64, indices.numel()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
