"""The tasks of one seed made ready, whatever the modality: fine-tuned weights, test sets and the router."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor, nn

from freemerge.experts.router import Router

TaskVector = dict[str, Tensor]
ROUTER_SAMPLES = 1000  # training examples of each task, labelled by task only
UNLABELLED_BATCH = 16


class Model(Protocol):
    """A network of which a part is fine-tuned and merged."""

    merged: nn.Module  #: that part

    def eval(self) -> object: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def train(self) -> object: ...


class Examples(Protocol):
    """Examples of one task, ready for the model."""

    @property
    def labels(self) -> Tensor: ...

    def rows(self, rows: list[int]) -> Examples:
        """Some of the examples."""
        ...

    def predictions(self, model: Model) -> Tensor:
        """The class of each example, (N,), with the weights the model holds now."""
        ...

    def logits(self, model: Model, state: TaskVector) -> Tensor:
        """(N, classes), with other weights by the names that the model has for them, which may require gradients."""
        ...


def weights(model: Model) -> TaskVector:
    """The merged part's tensors, as the model holds them (not copies)."""
    return dict(model.merged.state_dict(keep_vars=False))


@dataclass
class Suite:
    """Everything that the methods of one seed are measured on."""

    model: Model
    base: TaskVector
    models: list[TaskVector]
    names: list[str]
    validation: Sequence[Examples]
    test: Sequence[Examples]
    routes: list[Tensor]  # for each task, the index of the task that the router takes each test example for

    @property
    def vectors(self) -> list[TaskVector]:
        """theta_i - theta_0 of each task."""
        return [{name: model[name] - self.base[name] for name in self.base} for model in self.models]

    @property
    def dense_bytes(self) -> float:
        """Bytes of the merged part of the model in fp16: what keeping one fine-tuned model costs."""
        return 2.0 * sum(tensor.numel() for tensor in self.base.values())

    def apply(self, *parts: TaskVector) -> None:
        """Load theta_0 plus the given task vectors into the model."""
        total = {name: sum((part[name] for part in parts), base) for name, base in self.base.items()}
        self.model.merged.load_state_dict(total)

    def accuracies(self, parts: Sequence[Sequence[TaskVector]], examples: Sequence[Examples]) -> list[float]:
        """Accuracy on each task with the sum of its own parts."""
        result = []
        for own, example in zip(parts, examples, strict=True):
            self.apply(*own)
            result.append(100.0 * float((example.predictions(self.model) == example.labels).double().mean()))
        return result

    def unlabelled(self, seed: int = 0) -> Callable[[TaskVector], Iterator[Tensor]]:
        """What :func:`freemerge.tune` asks for: logits of a batch of each task's validation split, without labels."""
        rng = random.Random(seed)
        prefix = next(name for name, module in self.model.named_modules() if module is self.model.merged)

        def logits(merged: TaskVector) -> Iterator[Tensor]:
            state = {f"{prefix}.{name}": tensor for name, tensor in merged.items()}
            for examples in self.validation:
                rows = rng.sample(range(len(examples.labels)), min(UNLABELLED_BATCH, len(examples.labels)))
                yield examples.rows(rows).logits(self.model, state)

        return logits

    def validate(self, parts: Sequence[Sequence[TaskVector]]) -> float:
        """Mean accuracy over the validation splits."""
        return fmean(self.accuracies(parts, self.validation))

    def routed(self, parts: Sequence[Sequence[TaskVector]]) -> tuple[list[float], list[float]]:
        """Accuracy on each task when every example is served by the expert that the router picks.

        First with the task's own head, then with the picked task's head too, where an example sent astray is lost.
        """
        own_head, picked_head = [], []
        for task, example in enumerate(self.test):
            predicted = torch.full_like(example.labels, -1)
            for expert in self.routes[task].unique().tolist():
                rows = torch.nonzero(self.routes[task] == expert).flatten().tolist()
                self.apply(*parts[expert])
                predicted[rows] = example.rows(rows).predictions(self.model)
            right = predicted == example.labels
            own_head.append(100.0 * float(right.double().mean()))
            picked_head.append(100.0 * float((right & (self.routes[task] == task)).double().mean()))
        return own_head, picked_head

    def routing_accuracy(self) -> float:
        """Share of test examples that the router sends to their own task, in percent, as a mean over tasks."""
        return fmean(100.0 * float((routes == task).double().mean()) for task, routes in enumerate(self.routes))

    def wrong_expert(self, parts: Sequence[Sequence[TaskVector]]) -> list[float]:
        """Accuracy on each task when the next task's expert serves all of its examples."""
        return self.accuracies([*parts[1:], parts[0]], self.test)


def routes(train: Sequence[Tensor], test: Sequence[Tensor], names: Sequence[str], seed: int) -> list[Tensor]:
    """Which task a router takes each test example for; ``train`` and ``test`` hold each task's features (N, F)."""
    owners = [name for name, features in zip(names, train, strict=True) for _ in features]
    router = Router.fit(torch.cat(list(train)), owners, seed=seed)
    return [router(features).argmax(1) for features in test]


Build = Callable[[Path, Sequence[str], int, int, int], Suite]
"""From cache folder, tasks, seed, steps and number of test examples: fine-tunes what the cache lacks."""
