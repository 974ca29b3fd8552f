"""Sparse updates of dense tensors: what the switch operation of every backend takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..dense import address
from ..lazy import cached_property
from ..overlap import extent
from .memory import dtype_code

NativeUpdate = tuple[int, int, int, int, bool, int, int, float, int]  # of csrc/bindings/sparse_updates.h


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
            self._places[layout] = _memory_indices(tensor, self.indices)
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
    """CPU memory for former weights, reused from switch to switch: fresh pages would cost a tenth of a switch.

    Not for several threads at once.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """At least so many bytes, until they are given back."""
        kept = self._free.pop() if self._free else None
        return (
            kept
            if kept is not None and kept.numel() >= nbytes
            else torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        )

    def give(self, memory: torch.Tensor) -> None:
        """Return memory that :meth:`take` handed out."""
        self._free.append(memory)


class BackendSwitch(ABC):
    """Updates of tensors on one device, prepared by a backend: they can be made and undone any number of times."""

    @abstractmethod
    def on(self, weights: Sequence[torch.Tensor], scratch: Scratch) -> Callable[[], None]:
        """Change ``weights``, which lie where those of the updates did; calling the result undoes it bit for bit."""

    def wait(self) -> None:  # noqa: B027
        """Wait until all that the preparation put on a device's stream is done, so that other streams may follow."""


def native_updates(updates: Sequence[Update]) -> tuple[list[NativeUpdate], list[torch.Tensor]]:
    """Updates as both compiled modules take them, and the tensors whose addresses they hold."""
    jobs, kept = [], []
    for update in updates:
        memory, indices = flat_memory(update.weights), update.entries.places(update.weights)
        jobs.append((
            address(memory), dtype_code(memory, "weights"), memory.numel(), *index_pointer(indices),
            address(update.entries.values), update.scale, 0 if update.origin is None else address(update.origin),
        ))  # fmt: skip
        kept += [indices, update.entries.values] + ([] if update.origin is None else [update.origin])
    return jobs, kept


def index_pointer(indices: torch.Tensor) -> tuple[int, bool, int]:
    """Indices as the compiled modules take them: address, whether they are int64, and their number."""
    return address(indices), indices.dtype == torch.int64, indices.numel()


def flat_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's memory as a vector, whatever its strides; shares memory with it."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((extent(tensor.shape, tensor.stride()),), (1,))


def _memory_indices(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Where the entries at flat (row-major) ``indices`` lie in :func:`flat_memory`, in int32 if that is enough."""
    rest = indices.long()
    memory = torch.zeros_like(rest)
    for n, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        memory += rest % n * stride
        rest = torch.div(rest, n, rounding_mode="floor")
    return memory.to(torch.int32) if extent(tensor.shape, tensor.stride()) <= 1 << 31 else memory


def memory_of(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What keeps the memory of weights until they are restored, even if a tensor is given other data meanwhile, and
    follows it: sharing it with other processes moves it, under the tensors that lie in it."""
    return [tensor.detach() for tensor in weights]


def addresses_of(memory: Sequence[torch.Tensor]) -> list[int]:
    """Where memory lies now."""
    return [address(tensor) for tensor in memory]


def moved(jobs: Sequence[NativeUpdate], memory: Sequence[torch.Tensor]) -> list[NativeUpdate]:
    """The same jobs where their weights lie now."""
    return [(there, *job[1:]) for there, job in zip(addresses_of(memory), jobs, strict=True)]


def mark_changed(weights: Sequence[torch.Tensor]) -> None:
    """Tell autograd of a native write, so that a backward pass through the former weights is an error."""
    for tensor in weights:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)  # older ones take no list
