"""Task vectors v_i = theta_i - theta_0 in one pass over the stored weights: weighted sum, mean |v_i|, add and round.

Native kernels (``"cpu"``, ``"cuda"``) and torch ops (``"torch"``, any device) compute the same formulas. They round in
the same places (each product, then each sum, model after model, no fused multiply-add), so the tensors they
return are the same bytes; the means, float64 sums in another order, agree to about 1e-12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import _core
from ..errors import ArgumentError
from . import cuda_runtime
from .native import dtype_code, empty, runs_native

_CHUNK = 1 << 22  # entries the torch backend works on at a time, which bounds its extra memory


def task_vector_sum(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, list[float]]:
    """``(sum_i weights[i] * (models[i] - base), [mean |models[i] - base|])`` in one pass.

    Tensors are fp32, fp64, bf16 or fp16 of one shape, mixed as they come and with any strides. The sum is contiguous,
    float32, or float64 if any input is; it is written to ``out`` if given, which must have that dtype and shape and not
    overlap an input. A mean that is not finite says that this task vector holds a NaN or an infinity.
    """
    if len(weights) != len(models):
        raise ArgumentError(f"weights must hold one number per model, got {len(weights)} for {len(models)}")
    return _sum_and_means(base, models, [float(weight) for weight in weights], out, backend)


def abs_means(base: torch.Tensor, models: Sequence[torch.Tensor], *, backend: str = "auto") -> list[float]:
    """``[mean |models[i] - base|]``, E(v_i) of the paper, without writing anything; inputs as in task_vector_sum."""
    return _sum_and_means(base, models, None, None, backend)[1]


def add_round(
    base: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``round(base + scale * delta)`` to ``dtype`` in one pass; float64 arithmetic if base or delta is float64.

    ``out``, if given, receives the result: a contiguous tensor of that dtype and shape, which may be ``base`` or
    ``delta`` itself but must not overlap them otherwise.
    """
    _check_shapes(base, [("delta", delta)])
    if out is None:
        out = empty(base.shape, dtype, base.device)
    else:
        _check_out(out, base, dtype)
    codes = [dtype_code(out, "dtype"), dtype_code(base, "base"), dtype_code(delta, "delta")]
    if cuda_runtime.RUNTIME.runs(backend, (base, delta, out)):
        base, delta, stream = base.contiguous(), delta.contiguous(), cuda_runtime.RUNTIME.stream(base.device)
        if out.numel():
            cuda_runtime.RUNTIME.module.add_round(
                out.data_ptr(), codes[0], base.data_ptr(), codes[1], delta.data_ptr(), codes[2], scale, out.numel(),
                stream.device, stream.handle,
            )  # fmt: skip
        return out
    if runs_native(backend, (base, delta, out)):
        base, delta = base.contiguous(), delta.contiguous()
        _core.add_round(
            out.data_ptr(), codes[0], base.data_ptr(), codes[1], delta.data_ptr(), codes[2], scale, out.numel(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out
    compute = _compute_dtype([base, delta])
    for begin, target in enumerate_chunks(out.view(-1)):
        chunk = slice(begin, begin + target.numel())
        scaled = delta.reshape(-1)[chunk].to(compute) * scale
        target.copy_(scaled.add_(base.reshape(-1)[chunk].to(compute)))
    return out


def norm(tensors: Sequence[torch.Tensor], *, backend: str = "auto") -> float:
    """The Frobenius norm of several tensors together, summed in float64; the same for any number of threads."""
    return math.sqrt(math.fsum(_square_sum(tensor, backend) for tensor in tensors))


def _square_sum(tensor: torch.Tensor, backend: str) -> float:
    code = dtype_code(tensor, "tensors")
    if runs_native(backend, (tensor,)):
        tensor = tensor.contiguous()
        return _core.square_sum(tensor.data_ptr(), code, tensor.numel(), torch.get_num_threads())
    norms = [torch.linalg.vector_norm(chunk, dtype=torch.float64) for _, chunk in enumerate_chunks(tensor.reshape(-1))]
    return math.fsum(torch.stack(norms).square().tolist()) if norms else 0.0  # waits for a device once


def enumerate_chunks(flat: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Consecutive views of a vector with their first index."""
    return [(begin, flat[begin : begin + _CHUNK]) for begin in range(0, flat.numel(), _CHUNK)]


def _sum_and_means(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    weights: list[float] | None,
    out: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, list[float]]:
    if not models:
        raise ArgumentError("models must hold at least one tensor")
    _check_shapes(base, [(f"models[{i}]", model) for i, model in enumerate(models)])
    codes = [dtype_code(base, "base"), *(dtype_code(model, f"models[{i}]") for i, model in enumerate(models))]
    compute = _compute_dtype([base, *models])
    if out is None:
        out = empty(base.shape if weights is not None else (0,), compute, base.device)
    else:
        _check_out(out, base, compute)
    if cuda_runtime.RUNTIME.runs(backend, (base, *models)) and base.numel():
        return out, _sum_on_device(base.contiguous(), [model.contiguous() for model in models], codes, weights, out)
    if runs_native(backend, (base, *models)):
        base, models = base.contiguous(), [model.contiguous() for model in models]
        means = _core.accumulate(
            out.data_ptr() if weights is not None else 0, base.data_ptr(), codes[0],
            [model.data_ptr() for model in models], codes[1:], weights or [], base.numel(), torch.get_num_threads(),
        )  # fmt: skip
        return out, means
    base, models = base.reshape(-1), [model.reshape(-1) for model in models]
    sums = [torch.zeros((), dtype=torch.float64, device=base.device) for _ in models]
    for begin, chunk in enumerate_chunks(base):
        end = begin + chunk.numel()
        wide = chunk.to(compute)
        for i, model in enumerate(models):
            v = model[begin:end].to(compute) - wide
            sums[i] += v.abs().sum(dtype=torch.float64)
            if weights is not None:
                v.mul_(weights[i])
                target = out.view(-1)[begin:end]
                target.copy_(v) if i == 0 else target.add_(v)
    return out, [float(total) / max(1, base.numel()) for total in sums]


def _sum_on_device(
    base: torch.Tensor, models: list[torch.Tensor], codes: list[int], weights: list[float] | None, out: torch.Tensor
) -> list[float]:
    """The sum into ``out``, unless there are no weights, and the means."""
    module, stream, n = cuda_runtime.RUNTIME.module, cuda_runtime.RUNTIME.stream(base.device), base.numel()
    scratch = torch.empty(module.accumulate_scratch(n, len(models)), dtype=torch.float64, device=base.device)
    means = torch.empty(len(models), dtype=torch.float64, device=base.device)
    module.accumulate(
        out.data_ptr() if weights is not None else 0, base.data_ptr(), codes[0],
        [model.data_ptr() for model in models], codes[1:], weights or [], n, means.data_ptr(), scratch.data_ptr(),
        stream.device, stream.handle,
    )  # fmt: skip
    result: list[float] = means.tolist()
    return result


def _compute_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _check_out(out: torch.Tensor, base: torch.Tensor, dtype: torch.dtype) -> None:
    if out.shape != base.shape or out.dtype != dtype or out.device != base.device or not out.is_contiguous():
        raise ArgumentError(f"out must be a contiguous {dtype} tensor of shape {tuple(base.shape)} on {base.device}")


def _check_shapes(base: torch.Tensor, others: Sequence[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in others:
        if tensor.shape != base.shape:
            raise ArgumentError(f"{name} has shape {tuple(tensor.shape)} but base has {tuple(base.shape)}")
        if tensor.device != base.device:
            raise ArgumentError(f"{name} is on {tensor.device} but base is on {base.device}")
