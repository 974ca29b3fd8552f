"""The only list of backends, and the only place that picks one."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..cache import ByResponse, forget_all
from ..errors import ArgumentError, BackendError
from ..planner.costs import Traits
from ..planner.forms import first_plan
from ..planner.layout import ROWS, lay_out
from ..planner.plan import Plan
from ..responses import Response
from .base import Backend, BackendInfo

_LARGE_BATCH = 16  # matrices beyond which a batch's size changes no plan


def _by_preference(found: Sequence[Backend]) -> tuple[Backend, ...]:
    return tuple(sorted(found, key=lambda backend: (backend.preference, backend.name)))


def _find() -> tuple[Backend, ...]:
    """A backend of each concrete class in the modules of this folder."""
    package = __name__.rpartition(".")[0]
    names = [f"{package}.{module.name}" for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    modules = [importlib.import_module(name) for name in names if name != __name__]
    kinds = {kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)}
    return _by_preference([kind() for kind in kinds if issubclass(kind, Backend) and not inspect.isabstract(kind)])


BACKENDS = _find()


@contextmanager
def using(*found: Backend) -> Iterator[None]:
    """For tests: within the block these are the backends, and nothing is remembered of others."""
    global BACKENDS
    former, BACKENDS = BACKENDS, _by_preference(found)
    forget_all()
    try:
        yield
    finally:
        BACKENDS = former
        forget_all()


def backends() -> dict[str, BackendInfo]:
    """Every backend by name, whether it can run on this machine, and why not if it cannot."""
    return {backend.name: backend.info() for backend in BACKENDS}


def named(name: str) -> Backend | None:
    """The backend of a name, None for "auto"; :class:`ArgumentError` for a name that no backend has."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    if name != "auto":
        names = ", ".join(repr(backend.name) for backend in BACKENDS)
        raise ArgumentError(f"backend must be 'auto' or one of {names}, got {name!r}")
    return None


def pick(name: str, tensors: Sequence[torch.Tensor]) -> Backend:
    """The backend of a name, or the first for "auto", for an operation on vectors.

    Raises :class:`BackendError` if a backend asked for by name cannot run here, :class:`ArgumentError` if it does not
    take the tensors.
    """
    backend = named(name)
    if backend is not None:
        backend.require()
        refusal = backend.takes(tensors)
        if refusal is not None:
            raise ArgumentError(f"backend {name!r} {refusal}")
        return backend
    for backend in BACKENDS:
        # To ask whether a backend can run may start a GPU's driver: not for tensors that it could not take anyway.
        if backend.takes(tensors) is None and backend.info().available:
            return backend
    kinds = dict.fromkeys(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
    raise BackendError(f"no backend takes tensors of {', '.join(kinds)}")


def choose(
    response: Response,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    strides: Sequence[int] | None = None,
) -> tuple[Backend, Plan]:
    """The backend and plan for each matrix of a tensor, contiguous unless its strides are given; plans are cached.

    Raises :class:`ArgumentError` for an unknown backend name, and :class:`BackendError` if a backend asked for by name
    cannot run the request.
    """
    named(backend)
    layout = ROWS
    if strides is not None:
        response, shape, layout = lay_out(response, shape, strides)
    count = 1 if len(shape) < 3 else min(math.prod(shape[:-2]), _LARGE_BATCH)
    asked = [(known, known.traits(device)) for known in BACKENDS if backend in ("auto", known.name)]
    request = response, shape[-2:], dtype, str(device)
    key = *request, count, backend, *(traits for _, traits in asked)
    chosen, plan = _CHOICES.get(key, lambda: _first_that_can(request, count, asked, forced=backend != "auto"))
    return chosen, plan if layout is ROWS else replace(plan, layout=layout)


def _first_that_can(
    request: tuple[Response, tuple[int, ...], torch.dtype, str],
    count: int,
    asked: Sequence[tuple[Backend, Traits | None]],
    *,
    forced: bool,
) -> tuple[Backend, Plan]:
    refusals: list[str] = []
    for backend, traits in asked:
        # As in `pick`: a GPU's driver is not started for a tensor of another device, unless it is asked for by name.
        if traits is not None or forced:
            info = backend.info()
            if not info.available:
                refusals.append(f"backend {backend.name} is not available: {info.reason}")
                continue
        if traits is None:
            refusals.append(f"backend {backend.name} {backend.refusal(torch.device(request[-1]))}")
            continue
        plan = first_plan(*request, backend.name, traits, count, backend.supports, forced=forced)
        if not isinstance(plan, str):
            return backend, plan.because(refusals)
        refusals.append(f"backend {backend.name} {plan}")
    raise BackendError("; ".join(refusals))


_CHOICES: ByResponse[tuple[Backend, Plan]] = ByResponse(512)
