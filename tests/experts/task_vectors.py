"""Bases and fine-tuned models, and the entries that an expert keeps, selected in numpy."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import freemerge.experts as fx
from freemerge.checkpoint import Checkpoint
from freemerge.experts.names import Scope

State = dict[str, Tensor]
Source = Callable[[], tuple[State, dict[str, State]]]
SHAPES = {"a.weight": (40, 37), "b.weight": (7, 5, 3, 3), "b.bias": (7,), "c.weight": (300, 11), "n.weight": (64,)}


def state(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in SHAPES.items()}


def family(dtype: torch.dtype = torch.float32, models: int = 3) -> tuple[State, dict[str, State]]:
    base = state(0, dtype=dtype)
    tuned = {
        f"t{i}": {name: (base[name].float() + delta).to(dtype) for name, delta in state(i + 1, 0.02 * (i + 1)).items()}
        for i in range(models)
    }
    return base, tuned


@functools.cache
def trained() -> tuple[State, dict[str, State]]:
    """A classifier of handwritten digits, and what it becomes when it is trained on for three other questions."""
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)

    def fit(start: State | None, target: Tensor, steps: int) -> State:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        if start is not None:
            model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), target).backward()
            optimizer.step()
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    base = fit(None, labels, 60)
    tasks = {"odd": labels % 2, "large": (labels > 4).long(), "tripled": labels * 3 % 10}
    return base, {task: fit(base, target, 30) for task, target in tasks.items()}


def vectors(base: State, model: State) -> dict[str, np.ndarray]:
    return {name: (model[name].float() - base[name].float()).double().numpy() for name in sorted(base)}


def largest(v: np.ndarray, keep: int, skip: int) -> np.ndarray:
    """v with everything but ranks skip .. skip + keep - 1 set to zero; flat, stable."""
    order = np.argsort(-np.abs(v), kind="stable")[skip : skip + keep]
    kept = np.zeros_like(v)
    kept[order] = v[order]
    return kept


def reference_kept(v: dict[str, np.ndarray], density: float, scope: Scope, trim: float = 0.0) -> dict[str, np.ndarray]:
    def counts(n: int) -> tuple[int, int]:
        return max(1, int(density * n + 1e-9)), int(trim * n + 1e-9)

    if scope == "model":
        whole = np.concatenate([x.reshape(-1) for x in v.values()])
        pieces = np.split(largest(whole, *counts(whole.size)), np.cumsum([x.size for x in v.values()])[:-1])
        return {name: piece.reshape(x.shape) for (name, x), piece in zip(v.items(), pieces, strict=True)}
    if scope == "tensor":
        return {name: largest(x.reshape(-1), *counts(x.size)).reshape(x.shape) for name, x in v.items()}
    by_row = {}
    for name, x in v.items():
        rows = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1)
        by_row[name] = np.stack([largest(row, *counts(row.size)) for row in rows]).reshape(x.shape)
    return by_row


def dense(expert: fx.Expert, base: State) -> dict[str, np.ndarray]:
    """M(v, d) of an expert as dense arrays, all tensors."""
    zeros = {name: np.zeros(tuple(base[name].shape)) for name in sorted(base)}
    return zeros | {name: tensor.dense().double().numpy() for name, tensor in expert.tensors.items()}


SOURCES = [
    pytest.param(family, id="random"),
    pytest.param(functools.partial(family, torch.bfloat16), id="random bf16"),
    pytest.param(trained, id="trained"),
]


def counted_reads(experts: Iterable[object], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor in memory is read while experts are made; what was read before does not count."""
    reads: Counter[str] = Counter()
    in_memory = type(Checkpoint.open({}))
    read = in_memory.read

    def counted(self: Checkpoint, name: str) -> Tensor:
        reads[name] += 1
        return read(self, name)

    monkeypatch.setattr(in_memory, "read", counted)
    list(experts)
    return reads
