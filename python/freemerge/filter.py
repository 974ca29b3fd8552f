"""Filter tensors in the frequency domain: the kernel-level API, free of anything about models or merging."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np
import torch

from .backends.base import Backend
from .backends.memory import empty, matrices, multiply_
from .backends.registry import choose, named
from .backends.torch import exact_products
from .cache import ByResponse
from .errors import ArgumentError
from .overlap import internal_overlap, overlapping_pair
from .planner.plan import Plan
from .responses import Response, finite_number, transposed

T = TypeVar("T")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLOAT_MAX = torch.finfo(torch.float32).max
_CACHED_ROUTES = 1024


@dataclass(frozen=True, eq=False)
class _Route:
    """What filtering a tensor comes to, for all tensors of one shape, with equal strides, dtype and device."""

    backend: Backend
    plan: Plan
    whole: bool  #: a tensor is a matrix or a batch as it is
    transposed: bool  #: the last two axes change places, as the last but one is contiguous
    copies: bool  #: neither is contiguous: one matrix at a time is copied out and back


def filter_(x: T, response: Response, *, scale: float = 1.0, backend: str = "auto") -> T:
    """Filter in place, ``x <- scale * Re(ifft2(M * fft2(x)))`` (arXiv 2411.16815, section 4.1), and return ``x``.

    Args:
        x: a tensor [n] (filtered along its one axis), [H, W] or [..., H, W] (a batch), or a list or tuple of such
            tensors of any shapes, of which equal shapes run together. fp32, fp64, bf16 or fp16, on any device, with
            any strides. NumPy arrays and other DLPack producers are filtered in their own memory.
        response: which frequencies to keep; see :mod:`freemerge.responses`.
        scale: a factor on the result, free of charge.
        backend: "auto", or the name of a backend of :func:`freemerge.backends` that must do it.

    Arithmetic is fp64 for fp64 and fp32 for the rest, whose results are rounded once. A leaf that requires grad is
    updated as an optimizer does, outside autograd. A non-finite entry spreads over its matrix, or over as much of it as
    the filter's gains mix with it; nothing here looks for one. The result does not depend on the number of threads.

    Raises:
        ArgumentError: an argument is invalid, named in the message; nothing has been written.
        BackendError: the backend asked for cannot do it, and why; nothing has been written.
    """
    response, several, exact = _checked_response(response), isinstance(x, (list, tuple)), exact_products()
    named(backend)
    tensors: list[torch.Tensor] = []
    work: dict[_Route, list[torch.Tensor]] = {}
    for i, item in enumerate(cast(Sequence[Any], x) if several else (x,)):
        name = f"x[{i}]" if several else "x"
        tensor = _tensor(item, name)
        route = _route(response, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, backend, exact)
        if isinstance(route, str):
            raise ArgumentError(route.format(name=name))
        tensors.append(tensor)
        work.setdefault(route, []).append(tensor)
    if several:
        pair = overlapping_pair(tensors)
        if pair is not None:
            raise ArgumentError(f"x[{pair[0]}] and x[{pair[1]}] share memory; each would be filtered twice")
    number = _checked_scale(scale, tensors)
    for route, group in work.items():
        _run(route, group, number)
    return x


def filtered(x: T, response: Response, *, scale: float = 1.0, backend: str = "auto") -> T:
    """The result of :func:`filter_` in new memory, of the same type (a torch tensor for other DLPack producers)."""
    if isinstance(x, (list, tuple)):
        copies = [_copy(item, f"x[{i}]") for i, item in enumerate(x)]
        filter_(copies, response, scale=scale, backend=backend)
        return cast(T, copies if isinstance(x, list) else tuple(copies))
    copied: T = _copy(x, "x")
    return filter_(copied, response, scale=scale, backend=backend)


def explain(
    x: torch.Tensor | Sequence[int],
    response: Response,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Plan:
    """How :func:`filter_` treats each matrix of a tensor, or of a shape with the given dtype and device.

    The plan tells the backend, the form, its error bound, its memory and traffic, and why it was chosen; print it.
    """
    if isinstance(x, torch.Tensor):
        shape, dtype, device = tuple(x.shape), x.dtype, x.device
    else:
        try:
            shape = tuple(operator.index(n) for n in x)
        except TypeError:
            raise ArgumentError(f"x must be a tensor or a shape of whole numbers, got {x!r}") from None
    if not shape or min(shape) < 1:
        raise ArgumentError(f"x must have at least one axis and no empty one, got shape {shape}")
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    return choose(_checked_response(response), shape, dtype, torch.device(device), backend)[1]


def _checked_response(response: object) -> Response:
    if not isinstance(response, Response):
        raise ArgumentError(f"response must be a frequency response such as HighPass(0.4), got {response!r}")
    return response


def _checked_scale(scale: object, tensors: Iterable[torch.Tensor]) -> float:
    if type(scale) is float and -_FLOAT_MAX <= scale <= _FLOAT_MAX:
        return scale
    number = finite_number(scale)
    if number is None or (abs(number) > _FLOAT_MAX and any(x.dtype != torch.float64 for x in tensors)):
        raise ArgumentError(f"scale must be a finite number in the arithmetic of the tensors, got {scale!r}")
    return number


def _tensor(item: Any, name: str) -> torch.Tensor:
    """The memory of one input as a tensor that may be written."""
    x = item if isinstance(item, torch.Tensor) else _as_tensor(item, name)
    if x.layout is not torch.strided:
        raise ArgumentError(f"{name} must be a dense tensor with data, got layout {x.layout} on device {x.device}")
    if x.is_neg() or x.is_conj():
        raise ArgumentError(f"{name} is a lazily negated or conjugated view; pass {name}.resolve_neg()")
    if x.requires_grad:
        if not x.is_leaf:
            raise ArgumentError(
                f"{name} is part of an autograd graph, which the filter would break; pass {name}.detach()"
            )
        return x.detach()
    return x


def _find_route(
    response: Response,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    exact: bool,
) -> _Route | str:
    """The route of such tensors, or what is wrong with them, as a sentence about {name}."""
    del exact  # part of the key: plans depend on it
    if device.type == "meta":
        return f"{{name}} must be a dense tensor with data, got layout torch.strided on device {device}"
    if dtype not in _DTYPES:
        return f"{{name}} must have dtype {', '.join(str(d)[6:] for d in _DTYPES)}, got {dtype}"
    if not shape or 0 in shape:
        return f"{{name}} must have at least one axis and one entry, got shape {tuple(shape)}"
    if internal_overlap(shape, strides):
        return f"{{name}} may overlap itself in memory (strides {strides}); pass {{name}}.contiguous()"
    matrix, steps, wanted = tuple(shape), strides[-2:], response
    flips = len(shape) > 1 and steps[1] != 1 and steps[0] == 1 and shape[-1] > 1
    if flips:
        matrix, steps, wanted = (*shape[:-2], shape[-1], shape[-2]), steps[::-1], transposed(response)
    chosen, plan = choose(wanted, matrix, dtype, device, backend)
    whole = len(shape) in (2, 3) and strides[-1] == 1
    return _Route(chosen, plan, whole, flips, steps[-1] != 1 and matrix[-1] > 1)


_route = ByResponse(_find_route, _CACHED_ROUTES)


def _as_tensor(item: Any, name: str) -> torch.Tensor:
    if isinstance(item, torch.Tensor):
        return item
    if isinstance(item, np.ndarray):
        if not item.flags.writeable:
            raise ArgumentError(f"{name} is a read-only array")
        try:
            return torch.from_numpy(item)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{name} cannot be used as a tensor: {error}") from None
    if hasattr(item, "__dlpack__"):
        try:
            return torch.utils.dlpack.from_dlpack(item)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ArgumentError(f"{name} cannot be used as a tensor: {error}") from None
    raise ArgumentError(f"{name} must be a tensor, a NumPy array or a DLPack producer, got {type(item).__name__}")


def _copy(item: Any, name: str) -> Any:
    if isinstance(item, np.ndarray):
        return np.array(item)
    x = _as_tensor(item, name)
    if x.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(f"{name} requires grad, and the filter is not differentiable; pass {name}.detach()")
    if x.layout is not torch.strided or x.dtype not in _DTYPES:
        return x  # an error of filter_
    return empty(x.shape, x.dtype, x.device).copy_(x.detach())


def _run(route: _Route, tensors: Sequence[torch.Tensor], scale: float) -> None:
    inference = any(map(torch.Tensor.is_inference, tensors))
    if inference:
        with torch.inference_mode():  # only there may such a tensor be written
            _write(route, tensors, scale)
    else:
        _write(route, tensors, scale)
    for x in tensors:
        if not (inference and x.is_inference()):  # such a tensor has no version
            torch.autograd.graph.increment_version(x)


def _write(route: _Route, tensors: Sequence[torch.Tensor], scale: float) -> None:
    batches = tensors
    if not route.whole:
        batches = [b for x in tensors for b in _batches(x.transpose(-1, -2) if route.transposed else x)]
    if not scale:
        multiply_(batches, 0.0)
        return
    executable = route.backend.executable(route.plan)
    if not route.copies:
        executable.run(batches, scale)
    else:
        for matrix in matrices(batches):
            copy = matrix.contiguous()
            executable.run([copy], scale)
            matrix.copy_(copy)


def _batches(x: torch.Tensor) -> list[torch.Tensor]:
    """All matrices of ``x`` as [H, W] or [B, H, W]: one view, unless its strides need more than one batch axis."""
    if x.stride(-1) != 1 and x.shape[-1] == 1:
        x = x.as_strided(x.shape, (*x.stride()[:-1], 1))
    if x.ndim == 1:
        return [x[None]]
    if x.ndim <= 3:
        return [x]
    leading = [(size, stride) for size, stride in zip(x.shape[:-2], x.stride()[:-2], strict=True) if size > 1]
    if all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(leading)):
        step = leading[-1][1] if leading else x.shape[-2] * x.shape[-1]
        size, stride = (math.prod(x.shape[:-2]), *x.shape[-2:]), (step, *x.stride()[-2:])
        return [x.as_strided(size, stride)]
    return [batch for part in x.unbind(0) for batch in _batches(part)]
