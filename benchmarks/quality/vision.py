"""A perceptron that sees images, pretrained on symbols that no task shows, and its class heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from . import images
from .finetune import finetune, kept
from .images import SIDE, Split, Task
from .suite import ROUTER_SAMPLES, Suite, TaskVector, routes, weights

HIDDEN, DEPTH, WIDTH = 512, 4, 192
LOGIT_SCALE = 20.0
STEPS = 400  # of fine-tuning
RATE = 2e-4
PRETRAINING_STEPS, PRETRAINING_BATCH = 2000, 64


class Vision(nn.Module):
    """Normalised image embeddings by five linear layers, all of which are fine-tuned and merged.

    Large enough for files of .15 %, and trained in seconds on one core, where a transformer from scratch takes hours.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((SIDE * SIDE, *[HIDDEN] * DEPTH, WIDTH)):
            layers += [nn.Linear(inputs, outputs), nn.GELU()]
        self.merged = nn.Sequential(*layers[:-1])

    def forward(self, batch: Tensor) -> Tensor:
        """(B, 28, 28) -> unit embeddings (B, WIDTH)."""
        return F.normalize(self.merged(batch.flatten(1)), dim=-1)


def pretrained(cache: Path, seed: int) -> Vision:
    """The model that has learnt to tell symbols apart, however turned or inverted; kept in the cache."""
    path = cache / "weights" / f"vision-seed{seed}-pretrained{PRETRAINING_STEPS}.safetensors"
    torch.manual_seed(seed)
    model = Vision()
    if not path.exists():
        _pretrain(model, *images.symbols())
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        save_file(model.state_dict(), partial)
        partial.replace(path)
    model.load_state_dict(load_file(path))
    model.requires_grad_(False)
    return model.eval()


def _pretrain(model: Vision, symbols: Tensor, labels: Tensor) -> None:
    classes = nn.Linear(WIDTH, int(labels.max()) + 1)
    parameters = [*model.parameters(), *classes.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, PRETRAINING_STEPS, pct_start=0.1)
    for step in range(PRETRAINING_STEPS):
        rows = torch.randint(len(symbols), (PRETRAINING_BATCH,))
        batch = symbols[rows].flip([[], [1], [2], [1, 2]][step % 4])
        batch = 1 - batch if step % 3 == 0 else batch
        loss = F.cross_entropy(classes(model.merged(batch.flatten(1))), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"pretraining, step {step}: loss {float(loss.detach()):.2f}", flush=True)


@torch.inference_mode()
def embed(model: Vision, batch: Tensor) -> Tensor:
    """(N, WIDTH), normalised."""
    return torch.cat([model(part) for part in batch.split(256)])


@dataclass(frozen=True, eq=False)
class Examples:
    """Images of one task (N, 28, 28), labels (N,) and the task's head (classes, WIDTH)."""

    images: Tensor
    labels: Tensor
    head: Tensor

    @classmethod
    def of(cls, split: Split, head: Tensor) -> Examples:
        return cls(split.images, split.labels, head)

    def rows(self, rows: list[int]) -> Examples:
        """Some of the examples."""
        return Examples(self.images[rows], self.labels[rows], self.head)

    def predictions(self, model: Any) -> Tensor:
        """The class of each image, (N,), with the weights the model holds now."""
        return (embed(model, self.images) @ self.head.T).argmax(1)

    def logits(self, model: Any, state: TaskVector) -> Tensor:
        """(N, classes), with other weights."""
        return LOGIT_SCALE * torch.func.functional_call(model, state, self.images) @ self.head.T


def class_head(model: Vision, task: Task) -> Tensor:
    """A frozen head, (classes, WIDTH): where the pretrained embeddings of a class lie, seen from all of them."""
    embeddings, labels = embed(model, task.train.images), task.train.labels
    means = torch.stack([embeddings[labels == label].mean(0) for label in range(task.classes)])
    return F.normalize(means - means.mean(0), dim=1).clone()


def train(model: Vision, task: Task, head: Tensor, seed: int, steps: int) -> None:
    """Fine-tune the layers in place: cross-entropy on 20 cos(image, class)."""

    def loss(rows: list[int]) -> Tensor:
        logits = LOGIT_SCALE * model(task.train.images[rows]) @ head.T
        return F.cross_entropy(logits, task.train.labels[rows])

    finetune(model, loss, len(task.train.labels), task.name, seed, steps, RATE)


def build(cache: Path, names: Sequence[str], seed: int, steps: int, test: int) -> Suite:
    """Pretrain and fine-tune what the cache lacks, then load everything of one seed; at most ``test`` test images."""
    model = pretrained(cache, seed)
    base: TaskVector = {name: tensor.clone() for name, tensor in weights(model).items()}
    tasks = [images.load(name, cache, seed, test) for name in names]
    heads = [class_head(model, task) for task in tasks]
    folder = cache / "weights" / f"vision-seed{seed}-steps{steps}-test{test}"
    models = []
    for task, head in zip(tasks, heads, strict=True):
        path = folder / f"{task.name}.safetensors"
        models.append(kept(path, model, base, lambda task=task, head=head: train(model, task, head, seed, steps)))
    samples = [task.train.images[:ROUTER_SAMPLES].flatten(1) for task in tasks]
    return Suite(
        model,
        base,
        models,
        list(names),
        [Examples.of(task.validation, head) for task, head in zip(tasks, heads, strict=True)],
        [Examples.of(task.test, head) for task, head in zip(tasks, heads, strict=True)],
        routes(samples, [task.test.images.flatten(1) for task in tasks], names, seed),
    )
