"""The task vector of one tensor, read from checkpoints and checked."""

from __future__ import annotations

import math

from torch import Tensor

from ..accumulate import task_vector_sum
from ..checkpoint import Checkpoint
from ..errors import CheckpointError


def task_vector(model: Checkpoint, base: Checkpoint, name: str) -> Tensor:
    """theta_i - theta_0, or whatever the two are, float32 or float64; CheckpointError if it is not finite."""
    start = base.read(name)
    vector, means = task_vector_sum(start, [model.read(name).to(start.device)], [1.0])
    if not math.isfinite(means[0]):
        raise CheckpointError(f"{model.label}: {name!r} is not finite, or {base.label} has it not finite")
    return vector
