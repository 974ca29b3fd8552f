"""A router that tells three clouds of points apart, and a small model of token sequences."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from freemerge.experts import Router
from freemerge.experts.router import pooled

TASKS = ("cats", "dogs", "birds")


def blobs(count: int, seed: int, spread: float = 0.5) -> tuple[Tensor, list[str]]:
    """Features around three fixed centres in 6-D, far from standardised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (count,), generator=generator)
    centres = torch.eye(6)[:3] * 4
    features = centres[ids] + spread * torch.randn(count, 6, generator=generator)
    return 100 * features + 1000, [TASKS[i] for i in ids]


@cache
def fitted_router() -> Router:
    return Router.fit(*blobs(150, seed=0), hidden=16, steps=100)


class Sequences(nn.Module):
    """Token ids (N, T) -> embeddings -> logits (N, 4), with a mask, as text classifiers are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.passes = 0

    def forward(self, ids: Tensor, *, attention_mask: Tensor | None = None) -> dict[str, Tensor | None]:
        states = self.embed(ids)
        self.passes += 1
        states = torch.tanh(self.mix(states))
        return {"logits": self.head(pooled(states, attention_mask, "mean")), "loss": None}
