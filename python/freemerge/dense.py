"""Tensors with memory of their own, the only ones that native code can work on; their addresses are taken here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .errors import ArgumentError, FreemergeError
from .overlap import extent

_PLAIN = (Tensor, torch.nn.Parameter)


def dense(x: Tensor, name: str, error: type[FreemergeError] = ArgumentError) -> Tensor:
    """``x``, or the local tensor of a DTensor that every rank holds as a whole; they share memory.

    Raises ``error``, which says what to pass instead, for a tensor whose entries do not lie in memory of its own as its
    strides say: subclasses that wrap other tensors, sparse, quantised, nested and lazy ones, those on the meta device,
    those inside of torch.func transforms, and parameters whose memory was freed.
    """
    if type(x) in _PLAIN and _fits(x):  # in little time, as for a small matrix it counts
        return x
    if not isinstance(x, Tensor):
        raise error(f"{name} must be a tensor, got {type(x).__name__}")
    if _is_distributed(x):
        x = _local(x, name, error)
    reason = _obstacle(x)
    if reason is not None:
        raise error(f"{name} {reason}")
    return x


def address(x: Tensor) -> int:
    """Where the entries of a tensor begin. Every address that gets into native code comes from here."""
    if type(x) not in _PLAIN and _wraps(x):
        raise ArgumentError(f"a tensor {_obstacle(x)}")
    try:
        found = x.data_ptr()
    except RuntimeError:  # torch.func has wrapped it
        found = 0
    if not found and x.numel():
        raise ArgumentError(f"a tensor {_obstacle(x) or 'has no memory of its own'}")
    return found


def location(x: Tensor) -> tuple[object, ...]:
    """Where the entries of a tensor lie, and how: two with the same are one."""
    return address(x), x.dtype, x.shape, x.stride(), x.device


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor in row-major order, as uint8: its own memory if it is contiguous, else a copy."""
    whole = x.detach().contiguous()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)  # the stride of a single entry may be any


def bytes_of(x: Tensor) -> memoryview:
    """The same on the CPU."""
    return bits(x.cpu()).numpy().data


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors on one device, of any dtype, have one dtype, one shape and the same bytes."""
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as torch prints it, without the prefix: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def overwrite(x: Tensor, values: Tensor) -> Tensor:
    """Copy values into a tensor, outside of autograd; into one of inference mode, too."""
    with writing(x):
        return x.copy_(values)


def writing(x: Tensor) -> torch.inference_mode | torch.no_grad:
    """A block in which a tensor may be written in place, outside of autograd; one of inference mode, too."""
    return torch.inference_mode() if x.is_inference() else torch.no_grad()


def without_autocast(device: torch.device | str) -> AbstractContextManager[object]:
    """In the block products are computed in the dtype of their factors, whatever autocast says."""
    kind = torch.device(device).type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _wraps(x: Tensor) -> bool:
    """Whether the entries of a subclass lie in other tensors, or nowhere; those of nn.Parameter lie in its own."""
    return type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _is_distributed(x: Tensor) -> bool:
    """Whether it is a DTensor, without an import of torch.distributed."""
    return type(x) not in _PLAIN and hasattr(x, "placements") and hasattr(x, "device_mesh")


def _local(x: Tensor, name: str, error: type[FreemergeError]) -> Tensor:
    mesh = x.device_mesh  # type: ignore[attr-defined]
    for axis, placement in enumerate(x.placements):  # type: ignore[attr-defined]
        if not placement.is_replicate() and mesh.size(axis) > 1:
            raise error(f"{name} is a DTensor of which this rank holds a part ({placement}); pass full_tensor()")
    with torch.no_grad():
        local: Tensor = x.to_local()  # type: ignore[attr-defined]
    return local


def _fits(x: Tensor) -> bool:
    """Whether it is contiguous in a storage that is large enough."""
    if x.layout is not torch.strided or x.is_nested or x.is_quantized or not x.is_contiguous():
        return False
    if x.is_neg() or x.is_conj():
        return False
    try:
        return x.nbytes + x.storage_offset() * x.element_size() <= x.untyped_storage().nbytes() and not x.is_meta
    except RuntimeError:  # or NotImplementedError, which is one
        return False


def _obstacle(x: Tensor) -> str | None:
    """Why native code cannot work on it, as the rest of a sentence."""
    if type(x) not in _PLAIN and _wraps(x):
        return f"is of type {type(x).__name__}, without memory of its own; pass a plain tensor of its values"
    if is_lazy(x):
        return "is a parameter without a shape; run the module once before"
    if x.is_nested:
        return "is a nested tensor; pass its parts, as unbind() gives them"
    if x.layout is not torch.strided:
        return f"must be a dense tensor with data, got layout {x.layout} on device {x.device}; pass to_dense()"
    if x.is_meta:
        return f"must be a dense tensor with data, got layout {x.layout} on device {x.device}"
    if x.is_quantized:
        return f"is quantised ({x.dtype}); pass dequantize()"
    if x.is_neg():
        return "is a lazily negated view; pass resolve_neg()"
    if x.is_conj():
        return "is a lazily conjugated view; pass resolve_conj()"
    try:
        storage = x.untyped_storage()
        stored = storage.nbytes() if storage.data_ptr() else 0
    except RuntimeError:  # or NotImplementedError, which is one
        return "has no memory of its own here, as inside of torch.func transforms"
    if x.numel() and (x.storage_offset() + extent(x.shape, x.stride())) * x.element_size() > stored:
        return "has lost its memory, as sharded parameters do between passes; gather them first"
    return None
