"""Models in memory, and task vectors of tensors in memory, as a method is given them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freemerge.accumulate import filtered_sum, finished
from freemerge.methods.vectors import Deltas
from freemerge.responses import Response

State = dict[str, Tensor]


def deltas(name: str, base: Tensor, models: Sequence[Tensor], reads: list[str], *, transposed: bool = False) -> Deltas:
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
        transposed,
    )


def states(shapes: Mapping[str, tuple[int, ...]], count: int) -> tuple[State, list[State]]:
    """A base and ``count`` models, of which each is further from it than the one before."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    models = [
        {n: t + 0.1 * (i + 1) * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for i in range(count)
    ]
    return base, models


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names with the same values."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normally distributed entries, the same on every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def finished_sum(
    base: Tensor, models: Sequence[Tensor], weights: Sequence[float], response: Response
) -> tuple[Tensor, list[float], tuple[float, float] | None]:
    """A filtered sum after all of its passes."""
    total, means, norms = filtered_sum(base, models, weights, response)
    return finished(total), means, norms
