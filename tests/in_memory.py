"""Task vectors of tensors in memory, as a method is given them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freemerge.methods.vectors import Deltas


def deltas(name: str, base: Tensor, models: Sequence[Tensor], reads: list[str]) -> Deltas:
    """Task vectors of tensors in memory; ``reads`` lists every look at one of them."""

    def read(tensor: Tensor, label: str) -> Tensor:
        reads.append(label)
        return tensor

    def check(means: Sequence[float]) -> None:
        if not all(torch.isfinite(torch.tensor(means))):
            raise ValueError(name)

    return Deltas(
        name,
        tuple(base.shape),
        lambda: read(base, "base"),
        [lambda model=model, i=i: read(model, str(i)) for i, model in enumerate(models)],
        check,
    )
