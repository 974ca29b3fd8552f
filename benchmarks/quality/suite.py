"""The tasks of one seed made ready: weights of the fine-tuned encoders, test sets, heads and the router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from freemerge.experts.router import Router

from . import tasks
from .encoder import Encoder, Examples, class_head
from .finetune import finetuned, load
from .rivals import TaskVector

ROUTER_SAMPLES = 1000  # training texts of each task, labelled by task only


@dataclass
class Suite:
    """Everything that the methods of one seed are measured on."""

    encoder: Encoder
    base: TaskVector
    models: list[TaskVector]
    names: list[str]
    validation: list[Examples]
    test: list[Examples]
    router: Router
    routes: list[Tensor]  # for each task, the index of the task that the router takes each test text for

    @property
    def vectors(self) -> list[TaskVector]:
        """theta_i - theta_0 of each task."""
        return [{name: model[name] - self.base[name] for name in self.base} for model in self.models]

    @property
    def dense_bytes(self) -> float:
        """Bytes of the merged part of the encoder in fp16: what keeping one fine-tuned model costs."""
        return 2.0 * sum(tensor.numel() for tensor in self.base.values())

    def apply(self, *parts: TaskVector) -> None:
        """Load theta_0 plus the given task vectors into the encoder."""
        self.encoder.load({name: sum((part[name] for part in parts), base) for name, base in self.base.items()})

    def accuracies(self, parts: Sequence[Sequence[TaskVector]], examples: Sequence[Examples]) -> list[float]:
        """Accuracy on each task with the sum of its own parts."""
        result = []
        for own, example in zip(parts, examples, strict=True):
            self.apply(*own)
            result.append(100.0 * float((example.predictions(self.encoder) == example.labels).double().mean()))
        return result

    def validate(self, parts: Sequence[Sequence[TaskVector]]) -> float:
        """Mean accuracy over the validation splits."""
        return fmean(self.accuracies(parts, self.validation))

    def routed(self, parts: Sequence[Sequence[TaskVector]]) -> tuple[list[float], list[float]]:
        """Accuracy on each task when every text is served by the expert that the router picks.

        First with the task's own head, then with the picked task's head too, where a text sent astray is lost.
        """
        own_head, picked_head = [], []
        for task, example in enumerate(self.test):
            predicted = torch.full_like(example.labels, -1)
            for expert in self.routes[task].unique().tolist():
                rows = torch.nonzero(self.routes[task] == expert).flatten().tolist()
                self.apply(*parts[expert])
                predicted[rows] = example.rows(rows).predictions(self.encoder)
            right = predicted == example.labels
            own_head.append(100.0 * float(right.double().mean()))
            picked_head.append(100.0 * float((right & (self.routes[task] == task)).double().mean()))
        return own_head, picked_head

    def routing_accuracy(self) -> float:
        """Share of test texts that the router sends to their own task, in percent, as a mean over tasks."""
        return fmean(100.0 * float((routes == task).double().mean()) for task, routes in enumerate(self.routes))

    def wrong_expert(self, parts: Sequence[Sequence[TaskVector]]) -> list[float]:
        """Accuracy on each task when the next task's expert serves all of its texts."""
        return self.accuracies([*parts[1:], parts[0]], self.test)


def build(cache: Path, names: Sequence[str], seed: int, steps: int, test: int = tasks.TEST) -> Suite:
    """Fine-tune what the cache lacks, then load everything of one seed; at most ``test`` test texts a task."""
    encoder = Encoder(cache)
    base = {name: tensor.clone() for name, tensor in encoder.weights().items()}
    loaded = [tasks.load(name, cache, seed, test) for name in names]
    # The size of the test set is part of the name: with another one, the training texts are others too.
    folder = cache / "weights" / f"seed{seed}-steps{steps}-test{test}"
    models = [load(finetuned(encoder, base, task, folder, seed, steps)) for task in loaded]
    encoder.load(base)
    heads = [class_head(encoder, task) for task in loaded]
    router = _fit_router(encoder, loaded, seed)
    return Suite(
        encoder,
        base,
        models,
        list(names),
        [Examples.of(encoder, task.validation, head) for task, head in zip(loaded, heads, strict=True)],
        [Examples.of(encoder, task.test, head) for task, head in zip(loaded, heads, strict=True)],
        router,
        [router(encoder.word_features(task.test.texts)).argmax(1) for task in loaded],
    )


def _fit_router(encoder: Encoder, loaded: Sequence[tasks.Task], seed: int) -> Router:
    texts = [text for task in loaded for text in task.train.texts[:ROUTER_SAMPLES]]
    owners = [task.name for task in loaded for _ in task.train.texts[:ROUTER_SAMPLES]]
    return Router.fit(encoder.word_features(texts), owners, seed=seed)
