"""Other merging methods as functions of task vectors, each following its paper's formula.

A task vector maps a tensor name to theta_i - theta_0 in float32. Functions that return one task vector leave the
overall scale to the caller: theta = theta_0 + scale * merged. Inputs are never modified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TaskVector = dict[str, Tensor]


def flatten(vector: TaskVector) -> Tensor:
    """All entries of a task vector as one float32 vector."""
    return torch.cat([tensor.flatten() for tensor in vector.values()])


def unflatten(flat: Tensor, like: TaskVector) -> TaskVector:
    """The inverse of :func:`flatten`; the tensors share ``flat``'s memory."""
    pieces = flat.split([tensor.numel() for tensor in like.values()])
    return {name: piece.view_as(like[name]) for name, piece in zip(like, pieces, strict=True)}


def average(vectors: Sequence[TaskVector]) -> TaskVector:
    """Weight averaging: the mean of the fine-tuned weights, so the mean task vector at scale 1."""
    return {name: torch.stack([vector[name] for vector in vectors]).mean(0) for name in vectors[0]}


def task_arithmetic(vectors: Sequence[TaskVector]) -> TaskVector:
    """Task Arithmetic (Ilharco et al., arXiv 2212.04089): tau = sum_i tau_i."""
    return {name: torch.stack([vector[name] for vector in vectors]).sum(0) for name in vectors[0]}


def keep_largest(flat: Tensor, density: float) -> Tensor:
    """``flat`` with all but its round(density * n) largest magnitudes set to zero."""
    count = round(density * flat.numel())
    kept = torch.zeros_like(flat)
    if count:
        index = flat.abs().topk(count).indices
        kept[index] = flat[index]
    return kept


def ties(vectors: Sequence[TaskVector], density: float = 0.2) -> TaskVector:
    """TIES-Merging (Yadav et al., arXiv 2306.01708): trim each vector, elect signs by total mass, disjoint mean."""
    trimmed = torch.stack([keep_largest(flatten(vector), density) for vector in vectors])
    elected = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == elected) & (trimmed != 0)
    merged = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return unflatten(merged, vectors[0])


def dare(vectors: Sequence[TaskVector], drop: float = 0.9, seed: int = 0) -> TaskVector:
    """DARE (Yu et al., arXiv 2311.03099): drop entries at random, rescale the rest by 1 / (1 - p), then sum."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(flatten(vectors[0]))
    for vector in vectors:
        flat = flatten(vector)
        kept = torch.rand(flat.shape, generator=generator) >= drop
        total += flat * kept / (1.0 - drop)
    return unflatten(total, vectors[0])


def pcb(vectors: Sequence[TaskVector], density: float = 0.1) -> TaskVector:
    """PCB-Merging (Du et al., arXiv 2410.02396), the formulas of its section 3.

    beta_i = softmax(N norm(v_i * v_i)) * sum_j softmax(norm(v_i * v_j)), norm to [0, 1]; the largest ``density`` of
    each beta_i is kept, and the merged vector is sum_i beta_i v_i / sum_i beta_i.
    """
    flats = [flatten(vector) for vector in vectors]
    numerator, denominator = torch.zeros_like(flats[0]), torch.zeros_like(flats[0])
    for flat in flats:
        intra = torch.softmax(len(flats) * _unit_range(flat * flat), 0)
        inter = torch.zeros_like(flat)
        for other in flats:
            inter += torch.softmax(_unit_range(flat * other), 0)
        # Softmax over millions of entries is tiny; a common factor cancels in the quotient.
        beta = keep_largest(intra * inter * float(flat.numel()) ** 2, density)
        numerator += beta * flat
        denominator += beta
    return unflatten(numerator / denominator.clamp(min=1e-30), vectors[0])


def _unit_range(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-30)


def iso_c(vectors: Sequence[TaskVector]) -> TaskVector:
    """Iso-C (Marczak et al., arXiv 2502.04959): the summed task matrix with all singular values set to their mean.

    Tensors that are no matrices are averaged.
    """
    merged = average(vectors)
    for name, mean in merged.items():
        if mean.ndim == 2:
            left, values, right = torch.linalg.svd(mean * len(vectors), full_matrices=False)
            merged[name] = values.mean() * (left @ right)
    return merged


def tsv_m(vectors: Sequence[TaskVector]) -> TaskVector:
    """TSV-Merge (Gargiulo et al., arXiv 2412.00081): top 1/K of each task's singular triplets, decorrelated.

    The concatenated left (right) singular vectors are replaced by the nearest orthonormal ones (Procrustes), then
    U S V^T is summed. Tensors that are no matrices are averaged.
    """
    merged = average(vectors)
    for name, mean in merged.items():
        if mean.ndim != 2:
            continue
        rank = max(1, min(mean.shape) // len(vectors))
        triplets = [torch.linalg.svd(vector[name], full_matrices=False) for vector in vectors]
        left = torch.cat([u[:, :rank] for u, _, _ in triplets], 1)
        values = torch.cat([s[:rank] for _, s, _ in triplets])
        right = torch.cat([vh[:rank] for _, _, vh in triplets], 0)
        merged[name] = _nearest_orthonormal(left) * values @ _nearest_orthonormal(right)
    return merged


def _nearest_orthonormal(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


@dataclass(frozen=True)
class TaskSpecific:
    """A method that keeps something for each task: the task vector to use for task i, and the bytes it costs."""

    vectors: list[TaskVector]
    bytes_per_task: float


def emr(vectors: Sequence[TaskVector]) -> TaskSpecific:
    """EMR-Merging (Huang et al., arXiv 2405.17461): lambda_i * M_i * tau, a sign-masked elected vector.

    tau has the sign of sum_i v_i and the largest magnitude among the v_i that agree; M_i = [v_i tau > 0];
    lambda_i = sum |v_i| / sum |M_i tau|. A task costs its mask, one bit an entry, and one fp32 number.
    """
    flats = torch.stack([flatten(vector) for vector in vectors])
    sign = flats.sum(0).sign()
    elected = sign * (flats * sign).clamp(min=0).amax(0)
    specific = []
    for flat in flats:
        masked = torch.where(flat * elected > 0, elected, 0.0)
        scale = flat.abs().sum() / masked.abs().sum().clamp(min=1e-30)
        specific.append(unflatten(scale * masked, vectors[0]))
    return TaskSpecific(specific, flats.shape[1] / 8 + 4)


def twin_svd(vectors: Sequence[TaskVector], shared: TaskVector, rank: int) -> TaskSpecific:
    """Twin-Merging (Lu et al., arXiv 2406.15479): the shared vector plus a rank-r SVD of what it lacks for task i.

    ``shared``: the merged task vector, scale included. One-dimensional tensors are left shared. fp16 factors.
    """
    specific, count = [], 0
    for vector in vectors:
        own: TaskVector = {}
        count = 0
        for name, tensor in vector.items():
            own[name] = shared[name]
            if tensor.ndim == 2:
                left, values, right = torch.linalg.svd(tensor - shared[name], full_matrices=False)
                own[name] = shared[name] + left[:, :rank] * values[:rank] @ right[:rank]
                count += rank * (sum(tensor.shape))  # singular values go into one of the factors
        specific.append(own)
    return TaskSpecific(specific, 2.0 * count)
