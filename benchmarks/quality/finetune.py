"""Fine-tunes the encoder on each task and keeps the weights in the cache folder."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .encoder import LOGIT_SCALE, Encoder, class_head, pad
from .tasks import Task

STEPS = 80
BATCH = 32
LEARNING_RATE = 2e-4
WARMUP = 0.1


def finetune(encoder: Encoder, task: Task, seed: int, steps: int = STEPS) -> None:
    """Train the encoder's layers in place: AdamW, linear warm-up and decay, cross-entropy on 20 cos(text, prompt)."""
    torch.manual_seed(seed)
    rng = random.Random(f"train {task.name} {seed}")
    head = class_head(encoder, task)
    tokens = encoder.tokens(task.train.texts)
    parameters = list(encoder.bert.encoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    order: list[int] = []
    encoder.train()
    encoder.bert.encoder.requires_grad_(True)
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.sample(range(len(tokens)), len(tokens))
        rows, order = order[:BATCH], order[BATCH:]
        ids, mask = pad([tokens[row] for row in rows])
        logits = LOGIT_SCALE * encoder(ids, mask) @ head.T
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([task.train.labels[row] for row in rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    encoder.requires_grad_(False)
    encoder.eval()


def finetuned(encoder: Encoder, base: dict[str, Tensor], task: Task, folder: Path, seed: int, steps: int) -> Path:
    """The file in ``folder`` with this task's weights, trained from ``base`` if it is not there yet."""
    path = folder / f"{task.name}.safetensors"
    if not path.exists():
        encoder.load(base)
        started = time.perf_counter()
        finetune(encoder, task, seed, steps)
        print(f"fine-tuned {task.name}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        save_file({key: value.detach().clone() for key, value in encoder.weights().items()}, partial)
        partial.replace(path)  # an interrupted run leaves no half-written weights behind
    return path


def load(path: Path) -> dict[str, Tensor]:
    return load_file(path)
