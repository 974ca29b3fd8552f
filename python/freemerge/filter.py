"""Filter tensors in the frequency domain: the kernel-level API, free of anything about models or merging."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from ._core import is_read_only
from .arguments import finite_number
from .backends.base import Backend, Executable
from .backends.memory import matrices, multiply_
from .backends.registry import choose, named
from .backends.result_memory import empty
from .cache import ByResponse
from .dense import dense
from .errors import ArgumentError
from .ops import define, filter_in_graph, filtered_in_graph
from .overlap import extent, internal_overlap, overlapping_pair
from .planner.layout import ROWS
from .planner.plan import Plan
from .responses import Response

T = TypeVar("T")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DLPACK_CPU = 1  # kDLCPU of dlpack.h
_LEAST_FACTOR = 2.0**-64  # that kernels multiply by, in float32
_FLOAT_MAX = torch.finfo(torch.float32).max


class _Route:
    """A plan with its backend and executable, for all tensors of one shape, with equal strides, dtype and device.

    ``nbytes``: of memory from the first to the last of their entries.
    """

    def __init__(self, backend: Backend, plan: Plan, device: torch.device, whole: bool, nbytes: int) -> None:
        self.plan = plan
        self._backend, self._device = backend, device
        traits = backend.traits(device)
        self._traits = traits
        self.varies = traits is not None and traits.vary
        self._whole = whole and plan.layout == ROWS  # a tensor is a matrix or a batch as it is
        self.nbytes = nbytes
        self.entry, _ = backend.entry(plan)

    def holds(self) -> bool:
        """Whether the backend is still as it was when the plan was made."""
        return not self.varies or self._backend.traits(self._device) is self._traits

    def run(self, tensors: Sequence[torch.Tensor], scale: float) -> None:
        """Filter tensors of which all or none are inference tensors."""
        executable = self.entry.value
        if executable is None:  # evicted
            self.entry, executable = self._backend.entry(self.plan)
        if tensors[0].is_inference():
            with torch.inference_mode():  # only there may such tensors be written; they have no version
                self._scale(executable, tensors, scale)
            return
        if self._whole and abs(scale) >= _LEAST_FACTOR:
            executable.run(tensors, scale)
        else:
            self._scale(executable, tensors, scale)
        for x in tensors:
            increment_version(x)

    def _scale(self, executable: Executable, tensors: Sequence[torch.Tensor], scale: float) -> None:
        if not 0 < abs(scale) < _LEAST_FACTOR:
            self._rearrange(executable, tensors, scale)
            return
        # The transforms' own factors would make a denormal of it. A power of two rounds no result a second time.
        mantissa, exponent = math.frexp(scale)
        self._rearrange(executable, tensors, mantissa)
        while exponent:  # in steps that are numbers of float32
            step = max(exponent, -100)
            multiply_(tensors, math.ldexp(1.0, step))
            exponent -= step

    def _rearrange(self, executable: Executable, tensors: Sequence[torch.Tensor], scale: float) -> None:
        layout = self.plan.layout
        batches = [b for x in tensors for b in _batches(x.transpose(-1, -2) if layout.flipped else x)]
        if not scale:
            multiply_(batches, 0.0)
        elif not layout.copied:
            executable.run(batches, scale)
        else:
            for matrix in matrices(batches):
                copy = matrix.contiguous()
                executable.run([copy], scale)
                matrix.copy_(copy)


_ROUTES: ByResponse[_Route] = ByResponse(1024)  # keys name the CPU by True: to make and compare its device takes longer


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
    Within torch.compile each tensor is one node of the graph, ``torch.ops.freemerge.filter_``, and tensors that share
    memory are not found out. Where memory runs out, or a call is interrupted, some matrices of a list or a batch may
    have been filtered and others not, each of them as a whole on a CPU.

    Raises:
        ArgumentError: an argument is invalid, named in the message; nothing has been written.
        BackendError: the backend asked for cannot do it, and why; nothing has been written.
    """
    if is_compiling():
        _check_request(response, backend, scale)
        for tensor in x if isinstance(x, (list, tuple)) else [x]:
            filter_in_graph(cast(torch.Tensor, tensor), response, scale, backend)
        return x
    known = _known_route(response, x, backend)
    if known is not None:
        one: tuple[Any] = (x,)
        easy = type(scale) is float and -_FLOAT_MAX <= scale <= _FLOAT_MAX
        known.run(one, scale if easy else _checked_scale(scale, one))
        return x
    _check_request(response, backend)
    if not isinstance(x, (list, tuple)):
        tensor = _tensor(x, "x")
        _route(response, tensor, backend, "x").run((tensor,), _checked_scale(scale, (tensor,)))
        return x
    named(backend)
    names = [f"x[{i}]" for i in range(len(x))]
    tensors = [_tensor(item, name) for item, name in zip(x, names, strict=True)]
    work: dict[tuple[_Route, bool], list[torch.Tensor]] = {}
    for tensor, name in zip(tensors, names, strict=True):
        route = _route(response, tensor, backend, name)
        work.setdefault((route, tensor.is_inference()), []).append(tensor)
    pair = overlapping_pair(tensors)
    if pair is not None:
        raise ArgumentError(f"x[{pair[0]}] and x[{pair[1]}] share memory; each would be filtered twice")
    number = _checked_scale(scale, tensors)
    for (route, _), group in work.items():
        route.run(group, number)
    return x


def filtered(x: T, response: Response, *, scale: float = 1.0, backend: str = "auto") -> T:
    """The result of :func:`filter_` in new memory, of the same type (a torch tensor for other DLPack producers).

    It is differentiable, but not in forward mode: the filter is linear and its own adjoint, so that the gradient is the
    filtered gradient.

    Raises:
        ArgumentError, BackendError: as :func:`filter_`; ArgumentError for a DTensor that requires grad, too.
    """
    if isinstance(x, (list, tuple)):
        traced = [_is_traced(item) for item in x]
        items = [item if told else _copy(item, f"x[{i}]") for i, (item, told) in enumerate(zip(x, traced, strict=True))]
        if not any(traced):
            filter_(items, response, scale=scale, backend=backend)
            return cast(T, items if isinstance(x, list) else tuple(items))
        if not is_compiling():
            for i, item in enumerate(items):
                _check_tensor(_as_tensor(item, f"x[{i}]"), f"x[{i}]")
        each = [
            (filtered if told else filter_)(item, response, scale=scale, backend=backend)
            for item, told in zip(items, traced, strict=True)
        ]
        return cast(T, each if isinstance(x, list) else tuple(each))
    if _is_traced(x):
        tensor = cast(torch.Tensor, x)
        _check_request(response, backend, scale)
        if not is_compiling():
            _check_tensor(_as_tensor(tensor, "x"), "x")
            scale = _checked_scale(scale, (tensor,))
        return cast(T, filtered_in_graph(tensor, response, scale, backend))
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

    Raises:
        ArgumentError: an argument is invalid, named in the message.
        BackendError: the backend asked for cannot do it, and why.
    """
    _check_request(response, backend)
    if isinstance(x, torch.Tensor):
        x = x if x.is_meta and x.layout is torch.strided else dense(x, "x")
        _check_kind(x.shape, x.dtype)
        return choose(response, tuple(x.shape), x.dtype, x.device, backend, x.stride())[1]
    try:
        shape = tuple(operator.index(n) for n in x)
    except TypeError:
        raise ArgumentError(f"x must be a tensor or a shape of whole numbers, got {x!r}") from None
    _check_kind(shape, dtype)
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError(f"device must be one that torch knows, got {device!r}") from None
    return choose(response, shape, dtype, device, backend)[1]


def _check_kind(shape: Sequence[int], dtype: torch.dtype) -> None:
    if not shape or min(shape) < 1:
        raise ArgumentError(f"x must have at least one axis and no empty one, got shape {tuple(shape)}")
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")


def _check_request(response: object, backend: object, scale: object = 1.0) -> None:
    """What can be told without the tensors, and of a scale that torch.compile does not know yet."""
    if not isinstance(response, Response):
        raise ArgumentError(f"response must be a frequency response such as HighPass(0.4), got {response!r}")
    if not isinstance(backend, str):
        raise ArgumentError(f"backend must be a name, got {backend!r}")
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise ArgumentError(f"scale must be a finite number in the arithmetic of the tensors, got {scale!r}")


def _checked_scale(scale: object, tensors: Sequence[torch.Tensor]) -> float:
    number = finite_number(scale)
    if number is None or (abs(number) > _FLOAT_MAX and any(x.dtype != torch.float64 for x in tensors)):
        raise ArgumentError(f"scale must be a finite number in the arithmetic of the tensors, got {scale!r}")
    return number


def _check_tensor(x: torch.Tensor, name: str) -> None:
    """Whether it can be filtered as a part of a graph."""
    if dense(x, name) is not x and _is_traced(x):
        raise ArgumentError(f"{name} is a DTensor that requires grad; pass {name}.to_local()")
    _check_entries(x, name)


def _check_entries(x: torch.Tensor, name: str) -> None:
    if x.dtype not in _DTYPES:
        raise ArgumentError(f"{name} must have dtype {', '.join(str(d)[6:] for d in _DTYPES)}, got {x.dtype}")
    if not x.shape or 0 in x.shape:
        raise ArgumentError(f"{name} must have at least one axis and one entry, got shape {tuple(x.shape)}")


def _tensor(item: Any, name: str) -> torch.Tensor:
    """The memory of one input as a tensor that may be written."""
    x = dense(_as_tensor(item, name), name)
    if x.requires_grad:
        if not x.is_leaf:
            raise ArgumentError(
                f"{name} is part of an autograd graph, which the filter would break; pass {name}.detach()"
            )
        return x.detach()
    return x


def _known_route(response: Response, x: Any, backend: str) -> _Route | None:
    """The route of a plain tensor like one that was checked before, in little time, as for a small matrix it counts.

    What tensors of one key can still differ in is looked at; a graph and every doubt are left to :func:`_tensor`.
    """
    if type(x) is not torch.Tensor or x.requires_grad or forward_ad._current_level >= 0:
        return None
    try:
        route = _ROUTES.find((response, x.shape, x.stride(), x.dtype, x.is_cpu or x.device, backend))
        if route is None or x.is_neg() or (route.varies and not route.holds()):
            return None
        offset = x.storage_offset()
        if route.nbytes + (offset and offset * x.element_size()) > x.untyped_storage().nbytes():
            return None
    except (RuntimeError, TypeError):  # a tensor without strides or storage, a response that is none
        return None
    route.entry.used = True
    return route


def _route(response: Response, x: torch.Tensor, backend: str, name: str) -> _Route:
    key = response, x.shape, x.stride(), x.dtype, x.is_cpu or x.device, backend
    route = _ROUTES.find(key)
    if route is not None and route.holds():
        route.entry.used = True
        return route
    shape, strides, dtype, device = x.shape, x.stride(), x.dtype, x.device
    _check_entries(x, name)
    if internal_overlap(shape, strides):
        raise ArgumentError(f"{name} may overlap itself in memory (strides {strides}); pass {name}.contiguous()")
    chosen, plan = choose(response, tuple(shape), dtype, device, backend, strides)
    nbytes = dtype.itemsize * extent(shape, strides)
    route = _Route(chosen, plan, device, len(shape) in (2, 3) and strides[-1] == 1, nbytes)
    _ROUTES.put(key, route)
    return route


def _as_tensor(item: Any, name: str, *, written: bool = True) -> torch.Tensor:
    if isinstance(item, torch.Tensor):
        strided = item.layout is torch.strided
        if strided and forward_ad._current_level >= 0 and forward_ad.unpack_dual(item).tangent is not None:  # type: ignore[no-untyped-call]
            raise ArgumentError(
                f"{name} has a tangent of forward mode, which would be lost; filter value and tangent apart"
            )
        return item
    if isinstance(item, np.ndarray):
        if isinstance(item, np.ma.MaskedArray):
            raise ArgumentError(f"{name} is a masked array, whose mask no filter heeds; pass {name}.filled(0)")
        if written and not item.flags.writeable:
            raise ArgumentError(f"{name} is a read-only array")
        try:
            return torch.from_numpy(item)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{name} cannot be used as a tensor: {error}") from None
    if hasattr(item, "__dlpack__"):
        if written and _is_read_only(item):
            raise ArgumentError(f"{name} is a read-only {type(item).__name__}")
        try:
            return torch.utils.dlpack.from_dlpack(item)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ArgumentError(f"{name} cannot be used as a tensor: {error}") from None
    raise ArgumentError(f"{name} must be a tensor, a NumPy array or a DLPack producer, got {type(item).__name__}")


def _is_traced(x: object) -> bool:
    """Whether a graph has to know of what is done to it: torch.compile's, or autograd's."""
    if is_compiling():
        return True
    return isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled()


def _is_read_only(item: Any) -> bool:
    """Whether a DLPack producer says so, which torch does not look at. One of before DLPack 1.0 cannot."""
    if item.__dlpack_device__()[0] != _DLPACK_CPU:
        return False
    try:
        return is_read_only(item.__dlpack__(max_version=(1, 0)))
    except (BufferError, RuntimeError, TypeError):  # which has no versions, or what torch will be refused, too
        return False


def _copy(item: Any, name: str) -> Any:
    if isinstance(item, np.ndarray):
        return np.array(item, dtype=item.dtype.newbyteorder("="), subok=True)
    x = _as_tensor(item, name, written=False)
    whole = dense(x, name)
    if whole is not x:  # a DTensor, as the result is
        return x.detach().clone()
    if x.dtype not in _DTYPES:
        return x  # an error of filter_
    return empty(x.shape, x.dtype, x.device).copy_(x.detach())


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


define(filter_, filtered)
