"""A merge of small trained models that runs on any machine in about a minute, without a download.

One small encoder is pretrained to reconstruct scikit-learn's handwritten digits, then fine-tuned on six tasks. Each
asks its own question about digits seen in its own way (mirrored, inverted, ...), through a frozen head of its own, as
CLIP's text embeddings are in the paper. The six encoders are saved and merged as checkpoint files by the real pipeline,
and scored on held-out digits: the merged models alone, and with experts that a router picks by the image.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ArgumentError, FreemergeError, RefusedError
from .experts import ExpertBank, RoutedModel, Router, iter_experts, save_experts
from .merging.recipe import Recipe
from .merging.run import merge_checkpoints

TRAIN, WIDTH, FEATURES = 1200, 256, 128
ROUTER_SAMPLES = 50  # labelled images a task that the router learns from
LOOPS = torch.tensor([1, 0, 0, 0, 0, 0, 1, 0, 2, 1])  # closed loops in the shape of each digit


@dataclass(frozen=True)
class Task:
    """A question about a digit (its label) and the way its images look, (n, 8, 8) to (n, 8, 8)."""

    label: Callable[[Tensor], Tensor]
    look: Callable[[Tensor], Tensor]


TASKS = {
    "digit": Task(lambda digit: digit, lambda image: image),
    "odd": Task(lambda digit: digit % 2, lambda image: 1 - image),
    "loops": Task(lambda digit: LOOPS[digit], lambda image: image.flip(2)),
    "modulo 3": Task(lambda digit: digit % 3, lambda image: image.transpose(1, 2)),
    "five or more": Task(lambda digit: digit.ge(5).long(), lambda image: image.flip(1)),
    "prime": Task(lambda digit: torch.isin(digit, torch.tensor([2, 3, 5, 7])).long(), lambda image: image.roll(4, 2)),
}

METHODS = {
    "weight average": Recipe(method="average"),
    "task arithmetic": Recipe(method="task_arithmetic"),
    "FR-Merging": Recipe(),
    "Iso-C": Recipe(method="iso_c"),
    "JSV": Recipe(method="jsv"),
}
EXPERTS: list[tuple[str, str, dict[str, Any]]] = [
    ("FR-Merging", "1 % entries", {"density": 0.01}),
    ("FR-Merging", "low rank", {"budget": "1%"}),
    ("Iso-C", "1 % entries", {"density": 0.01}),
    ("Iso-C", "low rank", {"budget": "1%"}),
    ("JSV", "gains", {"values": "gains"}),
    ("JSV", "gains, low rank", {"values": "gains", "budget": "1%"}),
]


class Digits:
    """The data: 1797 images of 8 x 8 pixels, shuffled; for each task its view of them, its labels and frozen head."""

    def __init__(self, seed: int) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise FreemergeError("the demo needs scikit-learn: pip install 'freemerge[demo]'") from None
        pixels, digits = load_digits(return_X_y=True)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pixels), generator=generator)
        images = torch.tensor(pixels / 16.0, dtype=torch.float32)[order].view(-1, 8, 8)
        digit = torch.tensor(digits)[order]
        self.images = {name: task.look(images).reshape(-1, 64) for name, task in TASKS.items()}
        self.labels = {name: task.label(digit) for name, task in TASKS.items()}
        self.heads = {
            name: F.normalize(torch.randn(int(labels.max()) + 1, FEATURES, generator=generator), dim=1)
            for name, labels in self.labels.items()
        }

    def logits(self, features: Tensor, name: str) -> Tensor:
        """Scaled cosines between features and the task's head: (n, classes)."""
        return 10 * F.normalize(features, dim=1) @ self.heads[name].T

    def correct(self, features: Tensor, name: str) -> float:
        """Percentage of the held-out digits that are right, given their features."""
        right = self.logits(features, name).argmax(1) == self.labels[name][TRAIN:]
        return 100 * float(right.float().mean())

    def accuracy(self, state: Mapping[str, Tensor], name: str) -> float:
        """Percentage of the held-out digits that an encoder with these weights gets right."""
        with torch.no_grad():
            return self.correct(build_encoder(state)(self.images[name][TRAIN:]), name)


def build_encoder(state: Mapping[str, Tensor] | None = None) -> nn.Sequential:
    """Pixels to features, three hidden layers; with the given weights or new ones."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([64, WIDTH, WIDTH, WIDTH, FEATURES]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    encoder = nn.Sequential(*layers[:-1])
    if state is not None:
        encoder.load_state_dict(dict(state))
    return encoder


def train(encoder: nn.Module, loss: Callable[[Tensor], Tensor], *, steps: int, rate: float, seed: int) -> None:
    """Minimise ``loss(rows)`` over random batches of training rows."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(TRAIN, (64,), generator=generator)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def pretrain(data: Digits, seed: int) -> dict[str, Tensor]:
    """The base: an encoder from whose features a fixed random linear map reconstructs the image, however it looks."""
    torch.manual_seed(seed)
    encoder = build_encoder()
    decoder = torch.randn(FEATURES, 64) / FEATURES**0.5
    looks = list(data.images.values())

    def loss(rows: Tensor) -> Tensor:
        images = looks[int(rows[0]) % len(looks)][rows]
        return F.mse_loss(encoder(images) @ decoder, images)

    train(encoder, loss, steps=1000, rate=1e-3, seed=seed)
    return encoder.state_dict()


def fine_tune(data: Digits, base: Mapping[str, Tensor], name: str, seed: int) -> dict[str, Tensor]:
    """The base trained on one task."""
    encoder = build_encoder(base)
    images, labels = data.images[name], data.labels[name]

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(data.logits(encoder(images[rows]), name), labels[rows])

    train(encoder, loss, steps=200, rate=3e-4, seed=seed)
    return encoder.state_dict()


def run_demo(seed: int = 0, keep: Path | None = None) -> dict[str, dict[str, float]]:
    """Train, merge and score; print a table of accuracies and return it as method -> task -> percentage.

    ``keep``: a new or empty directory for the checkpoints, else RefusedError.
    """
    if not 0 <= seed < 1 << 32:
        raise ArgumentError(f"seed must be at least 0 and less than 2**32, got {seed}")
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise RefusedError(f"{keep} exists and is not an empty directory")
    data = Digits(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads are slower on layers this small
    try:
        with torch.random.fork_rng(), nullcontext(keep) if keep else tempfile.TemporaryDirectory() as folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            return _run(Path(folder), data, seed)
    finally:
        torch.set_num_threads(threads)


def _run(folder: Path, data: Digits, seed: int) -> dict[str, dict[str, float]]:
    print(f"training a base and {len(TASKS)} fine-tuned models on scikit-learn's digits ...", file=sys.stderr)
    base = pretrain(data, seed)
    tuned = {name: fine_tune(data, base, name, seed) for name in TASKS}
    base_file = folder / "base.safetensors"
    models = {name: folder / f"{name.replace(' ', '-')}.safetensors" for name in TASKS}
    save_file(base, base_file)
    for name, path in models.items():
        save_file(tuned[name], path)

    table = {
        "pretrained": {name: data.accuracy(base, name) for name in TASKS},
        "individual": {name: data.accuracy(tuned[name], name) for name in TASKS},
    }
    merged: dict[str, dict[str, Tensor]] = {}
    for method, recipe in METHODS.items():
        out = folder / method.replace(" ", "-")
        merge_checkpoints(base_file, list(models.values()), out, recipe, force=True, progress=False)
        merged[method] = load_file(out / "model.safetensors")
        table[method] = {name: data.accuracy(merged[method], name) for name in TASKS}

    fp16_bytes = sum(2 * tensor.numel() for tensor in base.values())
    stored, notes = {"individual": 1.0} | dict.fromkeys(METHODS, 0.0), []
    for method, kind, options in EXPERTS:
        row = f"{method} + {kind}"
        out = folder / row.replace(" ", "")
        backbone = None if "density" in options else merged[method]
        saved = save_experts(iter_experts(base_file, models, backbone=backbone, **options), out)
        oracle, routed, right = _with_experts(data, base, merged[method], out)
        table |= {row: oracle, f"{row}, router": routed}
        stored |= dict.fromkeys((row, f"{row}, router"), fmean(expert.nbytes for expert in saved) / fp16_bytes)
        if _mean(oracle) < _mean(table[method]):
            notes.append(f"{row} is below {method}: so few entries do not stand for the whole task vector here")
        elif _mean(routed) < _mean(table[method]):
            notes.append(f"{row}, router is below {method}: the wrong expert is worse than none")
    _print_table(table, stored)
    print("stored: for each task, in percent of a model in 16-bit floats")
    print(f"expert of the task, known or picked by the router, which is right for {right:.0f} % of the images")
    print("\n".join(notes), end="\n" * bool(notes))
    return table


def _with_experts(
    data: Digits, base: Mapping[str, Tensor], merged: Mapping[str, Tensor], out: Path
) -> tuple[dict[str, float], dict[str, float], float]:
    """Accuracies of the merged backbone with an expert switched on: the right one, and the router's choice.

    And how often that is right, in percent.
    """
    encoder = build_encoder(merged)
    bank = ExpertBank.load(encoder, out, base=base)
    samples = torch.cat([data.images[name][:ROUTER_SAMPLES] for name in TASKS])
    router = Router.fit(samples, [name for name in TASKS for _ in range(ROUTER_SAMPLES)])
    model = RoutedModel(encoder, bank, router, features=lambda images: images)
    oracle, routed, right = {}, {}, {}
    with torch.no_grad():
        for name in TASKS:
            held_out = data.images[name][TRAIN:]
            with bank.active(name):
                oracle[name] = data.correct(encoder(held_out), name)
            result = model(held_out)
            routed[name] = data.correct(result.output, name)
            right[name] = 100 * result.served.count(name) / len(held_out)
    return oracle, routed, _mean(right)


def _mean(row: Mapping[str, float]) -> float:
    return fmean(row.values())


def _print_table(table: Mapping[str, Mapping[str, float]], stored: Mapping[str, float]) -> None:
    width = max(map(len, table))
    columns = {name: max(len(name), 5) + 2 for name in TASKS}
    heads = "".join(f"{name:>{columns[name]}}" for name in TASKS)
    print(f"{'accuracy, %':{width}}{heads}{'mean':>7}{'stored':>8}")
    for method, row in table.items():
        cells = "".join(f"{value:{columns[name]}.1f}" for name, value in row.items())
        cost = f"{100 * stored[method]:8.3g}" if method in stored else ""
        print(f"{method:{width}}{cells}{_mean(row):7.1f}{cost}")
