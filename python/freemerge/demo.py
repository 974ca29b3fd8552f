"""A merge of really trained models that runs anywhere in about a minute, with no download.

One small encoder is pretrained to reconstruct scikit-learn's handwritten digits, then fine-tuned on six questions about
them, each with a frozen head of its own, as CLIP's text embeddings are in the paper. The six encoders are saved, merged
as checkpoint files by the real pipeline, and scored on held-out digits.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import FreemergeError
from .pipeline import merge_checkpoints
from .recipe import Recipe
from .responses import HighPass

TRAIN, WIDTH, FEATURES = 1200, 256, 128
LOOPS = torch.tensor([1, 0, 0, 0, 0, 0, 1, 0, 2, 1])  # closed loops in the shape of each digit

QUESTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "digit": lambda digit: digit,
    "odd": lambda digit: digit % 2,
    "loops": lambda digit: LOOPS[digit],
    "modulo 3": lambda digit: digit % 3,
    "five or more": lambda digit: digit.ge(5).long(),
    "prime": lambda digit: torch.isin(digit, torch.tensor([2, 3, 5, 7])).long(),
}

METHODS = {
    "weight average": Recipe(HighPass(0), weights="uniform", scale=1.0, renormalize=None),
    "task arithmetic": Recipe(HighPass(0), weights="sum", scale=0.4, renormalize=None),
    "FR-Merging": Recipe(),
}


class Digits:
    """The data: 1797 images of 8 x 8 pixels, shuffled, and for each question its labels and frozen head."""

    def __init__(self, seed: int) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise FreemergeError("the demo needs scikit-learn: pip install 'freemerge[demo]'") from None
        images, digits = load_digits(return_X_y=True)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)
        self.images = torch.tensor(images / 16.0, dtype=torch.float32)[order]
        digit = torch.tensor(digits)[order]
        self.labels = {name: question(digit) for name, question in QUESTIONS.items()}
        self.heads = {
            name: F.normalize(torch.randn(int(labels.max()) + 1, FEATURES, generator=generator), dim=1)
            for name, labels in self.labels.items()
        }

    def logits(self, encoder: nn.Module, name: str, rows: slice | Tensor) -> Tensor:
        """Scaled cosines between features and the question's head: (n, classes)."""
        return 10 * F.normalize(encoder(self.images[rows]), dim=1) @ self.heads[name].T

    def accuracy(self, state: Mapping[str, Tensor], name: str) -> float:
        """Percentage of the held-out digits that an encoder with these weights gets right."""
        encoder = build_encoder()
        encoder.load_state_dict(dict(state))
        held_out = slice(TRAIN, None)
        with torch.no_grad():
            right = self.logits(encoder, name, held_out).argmax(1) == self.labels[name][held_out]
        return 100 * float(right.float().mean())


def build_encoder() -> nn.Sequential:
    """Pixels to features: three hidden layers."""
    sizes = [64, WIDTH, WIDTH, WIDTH, FEATURES]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(encoder: nn.Module, loss: Callable[[Tensor], Tensor], *, steps: int, rate: float, seed: int) -> nn.Module:
    """Minimise ``loss(rows)`` over random batches of training rows."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(TRAIN, (64,), generator=generator)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return encoder


def pretrain(data: Digits, seed: int) -> dict[str, Tensor]:
    """The base: an encoder from whose features a fixed random linear map reconstructs the image."""
    torch.manual_seed(seed)
    encoder = build_encoder()
    decoder = torch.randn(FEATURES, 64) / FEATURES**0.5
    train(
        encoder,
        lambda rows: F.mse_loss(encoder(data.images[rows]) @ decoder, data.images[rows]),
        steps=500,
        rate=1e-3,
        seed=seed,
    )
    return encoder.state_dict()


def fine_tune(data: Digits, base: Mapping[str, Tensor], name: str, seed: int) -> dict[str, Tensor]:
    """The base trained on one question."""
    encoder = build_encoder()
    encoder.load_state_dict(dict(base))
    labels = data.labels[name]
    train(
        encoder,
        lambda rows: F.cross_entropy(data.logits(encoder, name, rows), labels[rows]),
        steps=200,
        rate=3e-4,
        seed=seed,
    )
    return encoder.state_dict()


def run_demo(seed: int = 0, keep: Path | None = None) -> dict[str, dict[str, float]]:
    """Train, merge and score; print a table of accuracies and return it as method -> question -> percentage."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only lose time to more
    try:
        return _run_demo(seed, keep)
    finally:
        torch.set_num_threads(threads)


def _run_demo(seed: int, keep: Path | None) -> dict[str, dict[str, float]]:
    with torch.random.fork_rng(), nullcontext(keep) if keep else tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        data = Digits(seed)
        print(f"training a base and {len(QUESTIONS)} fine-tuned models on scikit-learn's digits ...", file=sys.stderr)
        base = pretrain(data, seed)
        tuned = {name: fine_tune(data, base, name, seed) for name in QUESTIONS}
        for name, state in {"base": base, **tuned}.items():
            save_file(state, root / f"{name.replace(' ', '-')}.safetensors")

        table = {
            "pretrained": {name: data.accuracy(base, name) for name in QUESTIONS},
            "individual": {name: data.accuracy(tuned[name], name) for name in QUESTIONS},
        }
        models = [root / f"{name.replace(' ', '-')}.safetensors" for name in QUESTIONS]
        for method, recipe in METHODS.items():
            out = root / method.replace(" ", "-")
            merge_checkpoints(root / "base.safetensors", models, out, recipe, force=True, progress=False)
            merged = load_file(out / "model.safetensors")
            table[method] = {name: data.accuracy(merged, name) for name in QUESTIONS}
        _print_table(table)
    return table


def _print_table(table: Mapping[str, Mapping[str, float]]) -> None:
    print(f"{'accuracy, %':18}" + "".join(f"{name:>14}" for name in QUESTIONS) + f"{'mean':>10}")
    for method, row in table.items():
        mean = sum(row.values()) / len(row)
        print(f"{method:18}" + "".join(f"{value:14.1f}" for value in row.values()) + f"{mean:10.1f}")
