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
from ..planner.forms import candidates
from ..planner.plan import Plan
from ..responses import Response, matrix_shape
from .base import Backend, BackendInfo
from .torch import exact_products

_CACHED_PLANS = 512
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
    response: Response, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[Backend, Plan]:
    """The backend and plan for each matrix of a tensor's shape; plans are cached.

    Raises :class:`ArgumentError` for an unknown backend name, and :class:`BackendError` if a backend asked for by name
    cannot run the request.
    """
    count = 1 if len(shape) < 3 else min(math.prod(shape[:-2]), _LARGE_BATCH)
    return _choose(response, shape[-2:], count, dtype, device, backend, exact_products())


def _first_that_can(
    response: Response,
    shape: tuple[int, ...],
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    exact: bool,
) -> tuple[Backend, Plan]:
    del exact  # part of the key: traits depend on it
    named(backend)
    refusals: list[str] = []
    for candidate in BACKENDS:
        if backend not in ("auto", candidate.name):
            continue
        traits = candidate.traits(device)
        # As in `pick`: a GPU's driver is not started for a tensor of another device.
        if traits is not None or backend != "auto":
            info = candidate.info()
            if not info.available:
                refusals.append(f"backend {candidate.name} is not available: {info.reason}")
                continue
        if traits is None:
            refusals.append(f"backend {candidate.name} does not run on device {device}")
            continue
        if backend == "auto" and traits.slow_rows and matrix_shape(shape)[0] == 1:
            refusals.append(f"backend {candidate.name} is slow on a single row: {traits.slow_rows}")
            continue
        plan, refusal = _first_supported(candidate, traits, response, shape, count, dtype, device)
        if plan is not None:
            return candidate, plan.because(refusals)
        refusals.append(f"backend {candidate.name} {refusal}")
    raise BackendError("; ".join(refusals))


_choose = ByResponse(_first_that_can, _CACHED_PLANS)


def _first_supported(
    backend: Backend,
    traits: Traits,
    response: Response,
    shape: tuple[int, ...],
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Plan | None, str]:
    if dtype not in traits.dtypes:
        return None, f"has no kernels for {dtype}"
    refusals: list[str] = []
    for plan in candidates(response, shape, dtype, str(device), backend.name, traits, count):
        refusal = backend.supports(plan)
        if refusal is None:
            if traits.workspace is not None:
                plan = replace(plan, workspace_bytes=traits.workspace(plan))
            return plan.because(refusals), ""
        refusals.append(f"form {plan.form}: {refusal}")
    return None, "; ".join(refusals) or f"has no form for {response!r} at {' x '.join(map(str, shape))}"
