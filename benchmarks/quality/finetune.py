"""Fine-tunes a model on a task and keeps the weights in the cache folder."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .suite import Model, TaskVector, weights

BATCH = 32
WARMUP = 0.1

Loss = Callable[[list[int]], Tensor]  # of these rows of the training examples


def finetune(model: Model, loss: Loss, count: int, key: str, seed: int, steps: int, rate: float) -> None:
    """Train the merged part in place on ``count`` examples: AdamW, linear warm-up and decay."""
    torch.manual_seed(seed)
    rng = random.Random(f"train {key} {seed}")
    parameters = list(model.merged.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    order: list[int] = []
    model.train()
    model.merged.requires_grad_(True)
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.sample(range(count), count)
        rows, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.merged.requires_grad_(False)
    model.eval()


def kept(path: Path, model: Model, start: TaskVector, train: Callable[[], None]) -> TaskVector:
    """The weights in a file of the cache; trained from ``start`` if it is not there yet."""
    if not path.exists():
        model.merged.load_state_dict(start)
        started = time.perf_counter()
        train()
        print(f"trained {path.stem} of {path.parent.name}: {time.perf_counter() - started:.0f} s", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        save_file({key: value.detach().clone() for key, value in weights(model).items()}, partial)
        partial.replace(path)  # an interrupted run leaves no half-written weights behind
    return load_file(path)
