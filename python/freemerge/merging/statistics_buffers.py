"""Running statistics: averaged over the models, never extrapolated, so that a variance stays one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor

from ..errors import CheckpointError

# BatchNorm, SyncBatchNorm and InstanceNorm of torch, the names of other frameworks, moving averages of weights and of
# codebooks, ranges that observers of activations have seen, normalisers of observations.
_STATISTICS = re.compile(
    r"(^|[._])(running|moving)_\w+$|(^|[._])(num_batches_tracked|cluster_size|embed_avg|amax|min_val|max_val)$"
    r"|\.(var|variance)$"
)
_OF_NORMS = re.compile(r"(^|[._])(running|moving)_(mean|var|variance|std)$")
_MOVING_AVERAGE = re.compile(r"(^|[._])ema([._]|$)")
_VARIANCE = re.compile(r"(running|moving)_(var|variance|std)$|\.(var|variance)$|(^|[._])amax$")


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic or a moving average, by its name."""
    return bool(_STATISTICS.search(name) or ("ema" in name and _MOVING_AVERAGE.search(name)))


def is_of_norm(name: str) -> bool:
    """Whether a tensor is the running mean or variance of a norm, by its name."""
    return bool(_OF_NORMS.search(name))


def convex(weights: Sequence[float], scale: float) -> tuple[list[float], float]:
    """Weights and scale for which ``theta_0 + scale * sum_i weights[i] (theta_i - theta_0)`` is an average.

    They are the given ones where those average already: none below zero, together at most 1. Otherwise negative ones
    count as 0, and the sum is brought down to 1.
    """
    shares = [max(0.0, scale * weight) for weight in weights]
    total = sum(shares)
    if total <= 1 and all(share == scale * weight for share, weight in zip(shares, weights, strict=True)):
        return list(weights), scale
    return [share / max(1.0, total) for share in shares], 1.0


def check_variance(name: str, merged: Tensor, sources: Iterable[tuple[str, Tensor]]) -> None:
    """Raise CheckpointError, naming the source, if a merged variance is negative: only negative ones give one."""
    if _VARIANCE.search(name) and merged.numel() and float(merged.min()) < 0:
        guilty = next((label for label, tensor in sources if float(tensor.min()) < 0), "the merged model")
        raise CheckpointError(f"{guilty}: tensor {name!r} is a variance and holds a negative number")
