"""Methods that freemerge does not have, as functions of task vectors, each following its paper's formula.

A task vector maps a tensor name to theta_i - theta_0 in float32. Inputs are never modified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .suite import TaskVector


def flatten(vector: TaskVector) -> Tensor:
    """All entries of a task vector as one float32 vector."""
    return torch.cat([tensor.flatten() for tensor in vector.values()])


def unflatten(flat: Tensor, like: TaskVector) -> TaskVector:
    """The inverse of :func:`flatten`; the tensors share ``flat``'s memory."""
    pieces = flat.split([tensor.numel() for tensor in like.values()])
    return {name: piece.view_as(like[name]) for name, piece in zip(like, pieces, strict=True)}


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
