"""Task vectors v_i = theta_i - theta_0 in one pass over the stored weights: weighted sum, mean |v_i|, add and round.

Every backend returns tensors of the same bytes; the means, float64 sums in another order, agree to about 1e-12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .backends.base import Check, unchecked
from .backends.base import LateSum as LateSum
from .backends.memory import arithmetic_of, dtype_code
from .backends.registry import choose, pick
from .backends.result_memory import empty
from .errors import ArgumentError
from .responses import Response


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
    _check_task_vectors(base, models, weights)
    compute = arithmetic_of([base, *models])
    if out is None:
        out = empty(base.shape, compute, base.device)
    else:
        _check_out(out, base, compute)
    base, models = _prepared(base, models)
    return out, pick(backend, (base, *models)).weighted_sum(base, models, [float(weight) for weight in weights], out)


def filtered_sum(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    weights: Sequence[float],
    response: Response,
    *,
    backend: str = "auto",
    check: Check = unchecked,
) -> tuple[torch.Tensor | LateSum, list[float], tuple[float, float] | None]:
    """The sum and the means of :func:`task_vector_sum`, and the sum is filtered if that takes fewer passes at once.

    The last is then the Frobenius norm of the sum before and after the filter; it is None if the sum is yet to be
    filtered. Both ways :func:`freemerge.filter_` with this ``response`` and ``backend`` makes the same bytes of it.
    Where it can, the last pass waits for a base, which :func:`add_round` then adds on the way; the norm after the
    filter is known to about 1e-6 in that case. ``check`` is called with the means once the inputs are read: before the
    filter runs, where it follows the sum.
    """
    _check_task_vectors(base, models, weights)
    out = empty(base.shape, arithmetic_of([base, *models]), base.device)
    base, models = _prepared(base, models)
    numbers, summing = [float(weight) for weight in weights], pick("auto", (base, *models))
    if out.ndim > 1 and out.numel():
        filtering, plan = choose(response, tuple(out.shape), out.dtype, out.device, backend)
        at_once = filtering.filtered_sum(plan, base, models, numbers, out, check) if filtering is summing else None
        if at_once is not None:
            means, before, after, total = at_once
            return total, means, (math.sqrt(before), math.sqrt(after))
    means = summing.weighted_sum(base, models, numbers, out)
    check(means)
    return out, means, None


def finished(total: torch.Tensor | LateSum) -> torch.Tensor:
    """What :func:`filtered_sum` returned, after all passes."""
    return total.tensor if isinstance(total, LateSum) else total


def abs_means(base: torch.Tensor, models: Sequence[torch.Tensor], *, backend: str = "auto") -> list[float]:
    """``[mean |models[i] - base|]``, E(v_i) of the paper, without writing anything; inputs as in task_vector_sum."""
    _check_task_vectors(base, models)
    base, models = _prepared(base, models)
    return pick(backend, (base, *models)).weighted_sum(base, models, None, None)


def part_means(
    base: torch.Tensor, models: Sequence[torch.Tensor], sizes: Sequence[int], *, backend: str = "auto"
) -> list[list[float]]:
    """:func:`abs_means` of each of several vectors, ``sizes`` entries each, that lie end to end in contiguous ones."""
    _check_task_vectors(base, models)
    if base.ndim != 1 or sum(sizes) != base.numel() or not all(x.is_contiguous() for x in (base, *models)):
        raise ArgumentError(f"base must be a contiguous vector of {sum(sizes)} entries, got shape {tuple(base.shape)}")
    base, models = _prepared(base, models)
    return pick(backend, (base, *models)).part_means(base, models, sizes)


def add_round(
    base: torch.Tensor,
    delta: torch.Tensor | LateSum,
    scale: float,
    dtype: torch.dtype,
    *,
    factor: float = 1.0,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    check: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """``round(base + scale * (factor * delta))`` to ``dtype`` in one pass; float64 arithmetic if base or delta is
    float64, else float32, in which the products are rounded one after the other.

    ``out``, if given, receives the result: a contiguous tensor of that dtype and shape, which may be ``base`` or
    ``delta`` itself but must not overlap them otherwise. ``check`` is called with the result, to look whether all of it
    is finite, unless the backend has seen that it is as it wrote.
    """
    _check_shapes(base, [("delta", delta)])
    if out is None:
        out = empty(base.shape, dtype, base.device)
    else:
        _check_out(out, base, dtype)
    for tensor, name in ((out, "dtype"), (base, "base")):
        dtype_code(tensor, name)
    base, finite = _plain(base), None
    if not (isinstance(delta, LateSum) and delta.add_round(out, base, scale, factor)):
        delta = finished(delta)
        dtype_code(delta, "delta")
        finite = pick(backend, (base, delta, out)).add_round(out, base, _plain(delta), scale, factor)
    if check is not None and not finite:
        check(out)
    return out


def elect(
    delta: torch.Tensor,
    weight: float,
    sums: Sequence[torch.Tensor],
    shares: Sequence[torch.Tensor] = (),
    *,
    least: float = 0.0,
    outlier: float = math.inf,
) -> None:
    """Add ``weight * delta``, where |delta| in float32 is at least ``least`` and below ``outlier``, to the first of two
    ``sums`` where it is positive and to the second where it is negative, and |weight| to that of ``shares``, if any.

    All are contiguous float32 or float64 tensors of one dtype and shape; both sums may be one.
    """
    for tensor in (*sums, *shares):
        _check_out(tensor, delta, arithmetic_of([delta]))
    pick("auto", (delta,)).elect(_plain(delta), weight, least, outlier, sums, shares)


def decide(sums: Sequence[torch.Tensor], shares: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """End the election that :func:`elect` held: of each entry the sum whose sign the sum of both has, over its share if
    there are any; 0 where the sum of both is 0. Returns the first of ``sums``, which holds it; all may be overwritten.
    """
    pick("auto", sums).decide(sums, shares)
    return sums[0]


def new_empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of the dtype and on the device of another, in memory that a merge uses again."""
    return empty(shape, like.dtype, like.device)


def count_magnitudes(
    model: torch.Tensor, base: torch.Tensor | None, counts: torch.Tensor, shift: int, above: int
) -> None:
    """Add to ``counts`` [2 ** bits], int64 on the CPU, how many entries of v = model - base, or of the model itself,
    have each value of some ``bits`` of |v|: of its 31 bits in float32, which order as it does, those before the last
    ``shift``, where all before them are ``above``.
    """
    dtype_code(model, "model")
    if base is not None:
        dtype_code(base, "base")
        base = _plain(base)
    tensors = (model,) if base is None else (model, base)
    pick("auto", tensors).count_magnitudes(_plain(model), base, counts, shift, above)


def norm(tensors: Sequence[torch.Tensor], *, backend: str = "auto") -> float:
    """The Frobenius norm of several tensors together, summed in float64; the same for any number of threads."""
    for tensor in tensors:
        dtype_code(tensor, "tensors")
    return math.sqrt(math.fsum(pick(backend, (x,)).square_sum(_plain(x)) for x in tensors))


def _plain(x: torch.Tensor) -> torch.Tensor:
    """As kernels read it: contiguous, without torch's lazy negation, which no address tells of."""
    return x.contiguous().resolve_neg()


def _prepared(base: torch.Tensor, models: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return _plain(base), [_plain(model) for model in models]


def _check_task_vectors(
    base: torch.Tensor, models: Sequence[torch.Tensor], weights: Sequence[float] | None = None
) -> None:
    if weights is not None and len(weights) != len(models):
        raise ArgumentError(f"weights must hold one number per model, got {len(weights)} for {len(models)}")
    if not models:
        raise ArgumentError("models must hold at least one tensor")
    named = [(f"models[{i}]", model) for i, model in enumerate(models)]
    _check_shapes(base, named)
    for name, tensor in (("base", base), *named):
        dtype_code(tensor, name)


def _check_out(out: torch.Tensor, base: torch.Tensor, dtype: torch.dtype) -> None:
    plain = out.is_contiguous() and not out.is_neg()
    if out.shape != base.shape or out.dtype != dtype or out.device != base.device or not plain:
        raise ArgumentError(f"out must be a contiguous {dtype} tensor of shape {tuple(base.shape)} on {base.device}")


def _check_shapes(base: torch.Tensor, others: Sequence[tuple[str, torch.Tensor | LateSum]]) -> None:
    for name, tensor in others:
        if tensor.shape != base.shape:
            raise ArgumentError(f"{name} has shape {tuple(tensor.shape)} but base has {tuple(base.shape)}")
        if tensor.device != base.device:
            raise ArgumentError(f"{name} is on {tensor.device} but base is on {base.device}")
