"""DARE (arXiv 2311.03099): drop entries at random and rescale the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..lazy import torch
from .base import Measured, Merged, Method
from .election import elected_sum
from .parameters import FLAG, WHOLE_NUMBER, parameter, share, weights_parameter
from .rules import default_scale, relative
from .task_arithmetic import TaskArithmetic
from .vectors import Deltas, Sides, TaskVectors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DARE(Method):
    """DARE: task arithmetic of task vectors, each entry of which is dropped with probability p and else over 1 - p.

    What is dropped depends on the seed, the tensor's name and the number of the model, and on nothing else: not on the
    order of the tensors, the device or the number of threads.

    Attributes:
        drop: the probability p.
        seed: another one drops other entries.
        weights: lambda_i = 1 at scale 0.4, or given at scale 1.
        sign_election: add up only the entries that agree with the elected sign, as TIES-Merging elects it.
    """

    name = "dare"
    title = "DARE"
    paper = "2311.03099"
    sees_matrices = False

    drop: float = parameter(0.9, "share of each task vector that is dropped", kind=share(0.9999))
    seed: int = parameter(0, "seed of what is dropped", kind=WHOLE_NUMBER)
    weights: Literal["sum"] | tuple[float, ...] = weights_parameter("sum")
    sign_election: bool = parameter(False, "keep the entries that agree with the sign of the sum", kind=FLAG)

    def default_scale(self, count: int) -> float:
        return default_scale(self.weights, count)

    def holds(self, count: int, matrix: Sides | None) -> float:
        return 1

    @property
    def linear(self) -> bool:
        return not self.sign_election

    def in_the_mean(self) -> Method:
        # Where signs are elected it is nearly that, too, as few entries meet.
        return TaskArithmetic(weights=self.weights)

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        return Merged([self._merged(tensor, measured.weights) for tensor in vectors.tensors])

    def _merged(self, tensor: Deltas, given: Sequence[float]) -> Tensor:
        left = 1.0 - self.drop
        weights = relative(given) if self.sign_election else [weight / left for weight in given]
        drawing = [self._drawing(tensor.name, model) for model in range(len(weights))]

        def kept(piece: Deltas) -> Iterator[Tensor]:
            """weights[i] times what is kept of v_i; numbers are drawn from piece to piece."""
            for delta, weight, generator in zip(piece.each(), weights, drawing, strict=True):
                drawn = torch.rand(piece.shape, generator=generator, dtype=torch.float32, device="cpu")
                yield delta.mul_(weight).masked_fill_((drawn < self.drop).to(delta.device), 0.0)

        def summed(piece: Deltas) -> Tensor:
            each = kept(piece)
            total = next(each)
            for delta in each:
                total.add_(delta)
            return total

        def elected(piece: Deltas) -> Tensor:
            return elected_sum(kept(piece)).mul_(max(map(abs, given)) / left)

        return tensor.by_pieces(elected if self.sign_election else summed)

    def _drawing(self, name: str, model: int) -> torch.Generator:
        """What draws a tensor's random numbers, on the CPU, where one thread draws the same numbers everywhere."""
        key = hashlib.sha256(f"{self.seed} {model} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
