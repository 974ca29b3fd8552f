"""Which backend runs a request, and by which plan. The only list of backends."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..cache import ByResponse
from ..errors import ArgumentError, BackendError
from ..planner.costs import Traits
from ..planner.forms import candidates
from ..planner.plan import Plan
from ..responses import Response, matrix_shape
from .base import Backend, BackendInfo
from .cpu import CpuBackend
from .cuda import CudaBackend
from .torch import TorchBackend
from .torch_products import exact_products

#: In order of preference: "auto" takes the first that can run.
BACKENDS: tuple[Backend, ...] = (CudaBackend(), CpuBackend(), TorchBackend())

_NAMES = ("auto", *(backend.name for backend in BACKENDS))
_CACHED_PLANS = 512
_LARGE_BATCH = 16  # matrices beyond which a batch's size changes no plan


def backends() -> dict[str, BackendInfo]:
    """Every backend by name, whether it can run on this machine, and why not if it cannot."""
    return {backend.name: backend.info() for backend in BACKENDS}


def choose(
    response: Response, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[Backend, Plan]:
    """The backend and plan for each matrix of a tensor's shape; plans are cached.

    Raises :class:`ArgumentError` for an unknown backend name, and :class:`BackendError` if a backend asked for by name
    cannot run the request.
    """
    count = 1 if len(shape) < 3 else min(math.prod(shape[:-2]), _LARGE_BATCH)
    return _choose(response, shape[-2:], count, dtype, device, backend, exact_products())


def check_backend(backend: str) -> None:
    """Raise :class:`ArgumentError` for a name that no backend has."""
    if backend not in _NAMES:
        names = ", ".join(repr(known.name) for known in BACKENDS)
        raise ArgumentError(f"backend must be 'auto' or one of {names}, got {backend!r}")


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
    check_backend(backend)
    refusals: list[str] = []
    for candidate in BACKENDS:
        if backend not in ("auto", candidate.name):
            continue
        traits = candidate.traits(device)
        # To ask whether a backend can run may start a GPU's driver: not for a tensor that it could not take anyway.
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
