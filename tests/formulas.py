"""The methods as their papers write them, plain, in float64 and with singular value decompositions.

Directions of less than 1e-5 of the largest singular value count as zero, which the papers leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
Vectors = Mapping[str, Sequence[Tensor]]  # the K task vectors of each tensor

# Matrices ------------------------------------------------------------------------------------------------------------


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left, values, right


def nonzero(matrix: Tensor, size: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets that count."""
    left, values, right = svd(matrix)
    kept = values > 1e-5 * (values[:1] if size is None else size)
    return left[:, kept], values[kept], right[kept]


def polar(matrix: Tensor) -> Tensor:
    left, _, right = nonzero(matrix)
    return left @ right


def mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def iso_c(vectors: Sequence[Tensor]) -> Tensor:
    left, values, right = nonzero(total(vectors))
    return mean(values) * left @ right


def iso_cts(vectors: Sequence[Tensor]) -> Tensor:
    count, rank = len(vectors), min(vectors[0].shape)
    own = min(rank // count, round((rank - int(0.8 * rank)) / count))
    common = rank - count * own
    left, values, right = nonzero(total(vectors))
    shared = left[:, :common]
    lefts, values_, rights = [shared], [values[:common]], [right[:common]]
    for vector in vectors:
        rest = vector.double() - shared @ shared.mT @ vector.double()
        u, s, vh = nonzero(rest, float(torch.linalg.norm(vector.double())))
        lefts, values_, rights = [*lefts, u[:, :own]], [*values_, s[:own]], [*rights, vh[:own]]
    return mean(torch.cat(values_)) * polar(torch.cat(lefts, 1)) @ polar(torch.cat(rights))


def tsv_m(vectors: Sequence[Tensor]) -> Tensor:
    rank = max(1, min(vectors[0].shape) // len(vectors))
    parts = [nonzero(vector) for vector in vectors]
    left = polar(torch.cat([u[:, :rank] for u, _, _ in parts], 1))
    right = polar(torch.cat([vh[:rank] for _, _, vh in parts]))
    return left @ torch.diag(torch.cat([s[:rank] for _, s, _ in parts])) @ right


def jsv(vectors: Sequence[Tensor]) -> Tensor:
    """In turns from TSV-M's bases: each is the polar factor of the sum that the other one and the diagonals give."""
    doubles = [vector.double() for vector in vectors if vector.any()]
    if not doubles:
        return total(vectors)
    rank = min(vectors[0].shape) // len(doubles)
    parts = [nonzero(vector) for vector in doubles]
    left = polar(torch.cat([u[:, :rank] for u, _, _ in parts], 1))
    right = polar(torch.cat([vh[:rank] for _, _, vh in parts]))
    shares = [1 / float(v.square().sum()) for v in doubles]

    def diagonals() -> list[Tensor]:
        return [torch.diag(left.mT @ v @ right.mT) for v in doubles]

    for _ in range(3):
        right = polar(
            total([s * torch.diag(d) @ left.mT @ v for s, d, v in zip(shares, diagonals(), doubles, strict=True)])
        )
        left = polar(
            total([s * v @ right.mT @ torch.diag(d) for s, d, v in zip(shares, diagonals(), doubles, strict=True)])
        )
    lengths = torch.stack(diagonals()).square().sum(0).sqrt()
    strongest = torch.nonzero(lengths).flatten()[lengths[lengths > 0].argsort(descending=True, stable=True)]
    values = torch.zeros_like(lengths)
    values[strongest] = torch.linspace(1.5, 0.5, len(strongest), dtype=torch.float64) * mean(lengths[lengths > 0])
    return left @ torch.diag(values.copysign(total(diagonals()))) @ right


def wudi(vectors: Sequence[Tensor], steps: float = 100.0) -> Tensor:
    """Where X' = B - X A goes from the sum of the task vectors in the time steps / lambda_1."""
    doubles = [vector.double() for vector in vectors if vector.any()]
    if not doubles:
        return total(vectors)
    grams = [v.mT @ v / v.square().sum() for v in doubles]
    gram, right = sum(grams), sum(v @ g for v, g in zip(doubles, grams, strict=True))
    values, directions = torch.linalg.eigh(gram)
    time = steps / values[-1]
    decay = torch.exp(-time * values)
    way = torch.where(time * values > 1e-9, (1 - decay) / values, time)
    return (total(vectors) @ directions * decay + right @ directions * way) @ directions.mT


SPECTRAL: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "tsv_m": tsv_m,
    "jsv": jsv,
    "wudi": wudi,
}


def total(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(vectors)).double().sum(0)


def spectral(method: str, vectors: Sequence[Tensor]) -> Tensor:
    """The merged matrix; of a batch, matrix by matrix; the mean of what is no matrix."""
    if vectors[0].ndim < 2:
        return total(vectors) / len(vectors)
    if vectors[0].ndim == 2:
        return SPECTRAL[method](vectors)
    return torch.stack([spectral(method, matrices) for matrices in zip(*vectors, strict=True)])


# Entries --------------------------------------------------------------------------------------------------------------


def largest(values: Array, density: float) -> npt.NDArray[np.bool_]:
    """Which values are at least the k-th largest, k = round(density n), or 1 where that is 0 and the density is not."""
    return first(values, max(1, round(density * values.size)) if density and values.size else 0)


def first(values: Array, k: int) -> npt.NDArray[np.bool_]:
    return values >= np.sort(values)[-k] if k else np.zeros(values.size, bool)


def ties(vectors: Sequence[Array], density: float = 0.2, weights: Sequence[float] | None = None) -> Array:
    shares = np.ones(len(vectors)) if weights is None else np.array(weights)
    trimmed = np.array(
        [w * np.where(largest(np.abs(v), density), v, 0.0) for v, w in zip(vectors, shares, strict=True)]
    )
    agrees = agreeing(trimmed)
    divisor = np.abs(shares) @ agrees
    return np.divide((trimmed * agrees).sum(0), divisor, out=np.zeros_like(divisor), where=divisor > 0)


def agreeing(vectors: Array) -> npt.NDArray[np.bool_]:
    """Which entries have the sign of their sum."""
    return (np.sign(vectors) == np.sign(vectors.sum(0))) & (vectors != 0)


def breadcrumbs(vectors: Sequence[Array], beta: float = 0.85, gamma: float = 0.007) -> Array:
    """Of one tensor."""
    sizes = [np.abs(v) for v in vectors]
    count = vectors[0].size
    most, outliers = round((1.0 - beta) * count), round(gamma * count)
    if beta + gamma < 1 and count:  # something is kept
        outliers = min(outliers, count - 1)
        most = max(most, outliers + 1)
    kept = [first(size, most) & ~first(size, outliers) for size in sizes]
    return (np.array(vectors) * kept).sum(0)


def model_stock(vectors: Sequence[Array]) -> Array:
    """Of one tensor: t = K cos / (1 + (K - 1) cos), 0 where the unit vectors cancel."""
    count = len(vectors)
    units = [v / max(float(np.linalg.norm(v)), 1e-300) for v in vectors]
    cosine = float(np.mean([a @ b for a, b in combinations(units, 2)]))
    left = 1 + (count - 1) * cosine
    return (count * cosine / left if left > 1e-6 else 0.0) * np.mean(vectors, 0)


def pcb(vectors: Sequence[Array], density: float = 0.1) -> Array:
    def norm(x: Array) -> Array:
        return (x - x.min()) / max(x.max() - x.min(), 1e-30)

    def softmax(x: Array) -> Array:
        return np.exp(x) / np.exp(x).sum()

    if not vectors[0].size:
        return vectors[0]
    numerator, denominator = np.zeros(vectors[0].size), np.zeros(vectors[0].size)
    for own in vectors:
        beta = softmax(len(vectors) * norm(own * own)) * sum(softmax(norm(own * other)) for other in vectors)
        beta = np.where(largest(np.float32(beta * beta.size**2), density), beta, 0.0)
        numerator += beta * own
        denominator += beta
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def emr(vectors: Sequence[Array]) -> Array:
    sign = np.sign(np.sum(vectors, 0))
    agreeing = [np.where(np.sign(v) == sign, np.abs(v), 0.0) for v in vectors]
    return sign * np.max(agreeing, 0)


def whole(formula: Callable[[Sequence[Array]], Array], vectors: Vectors) -> dict[str, Tensor]:
    """A formula of the entries of the whole model."""
    count = len(next(iter(vectors.values())))
    flat = [np.concatenate([own[i].double().numpy().ravel() for own in vectors.values()]) for i in range(count)]
    parts = torch.from_numpy(formula(flat)).split([own[0].numel() for own in vectors.values()])
    return {name: part.view(vectors[name][0].shape) for name, part in zip(vectors, parts, strict=True)}


# Models ---------------------------------------------------------------------------------------------------------------


def merged(method: str, vectors: Vectors, **options: Any) -> dict[str, Tensor]:
    """The merged task vector of each tensor by a method, at scale 1."""
    if method in SPECTRAL:
        averaged = ("embed",) if method == "wudi" else ()
        return {
            name: total(own) / len(own) if any(part in name for part in averaged) else spectral(method, own)
            for name, own in vectors.items()
        }
    if method in ("ties", "pcb", "emr"):
        formula = {"ties": ties, "pcb": pcb, "emr": emr}[method]
        return whole(lambda flat: formula(flat, **options), vectors)
    if method in ("breadcrumbs", "model_stock"):
        each = {"breadcrumbs": breadcrumbs, "model_stock": model_stock}[method]
        return {
            name: torch.from_numpy(each([v.double().numpy().ravel() for v in own], **options)).view(own[0].shape)
            for name, own in vectors.items()
        }
    factor = {"average": lambda count: 1 / count, "task_arithmetic": lambda count: 1.0}[method]
    return {name: factor(len(own)) * total(own) for name, own in vectors.items()}


def projection_scale(vectors: Vectors, result: Mapping[str, Tensor]) -> float:
    square = sum(float(v.double().square().sum()) for own in vectors.values() for v in own)
    return square / sum(float((result[name] * total(own)).sum()) for name, own in vectors.items())
