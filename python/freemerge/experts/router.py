"""The router R(x) of FREE-Merging: a light classifier that says which expert a sample needs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import number, path_of, whole_number
from ..checkpoint.target import write_file
from ..dense import dense, without_autocast
from ..errors import ArgumentError, CheckpointError, RefusedError, counted
from .deltas import compiled

Mode = Literal["top1", "softmax"]
Pool = Literal["mean", "first"]

FORMAT = "freemerge-router-1"
CONSTANT = 1e-6  # of a feature's largest entry, or of the median deviation: a deviation that is rounding
TENSORS = ("center", "spread", "hidden.weight", "hidden.bias", "output.weight", "output.bias")


@dataclass(frozen=True, eq=False)
class Router:
    """A multilayer perceptron with one hidden layer on standardised features, and how to read its output.

    Calling it maps features (N, D) to one weight per sample and task (N, K), in the order of ``tasks``: a one-hot row
    for ``"top1"`` (argmax R(x), the paper's hard choice), softmax(R(x) / temperature) for ``"softmax"``. A sample whose
    largest probability is below ``abstain`` gets a row of zeros: it is left to the merged backbone.

    Options are changed with ``dataclasses.replace(router, abstain=0.5)``; tensors are float32 and never modified.
    """

    tasks: tuple[str, ...]
    tensors: dict[str, Tensor]
    mode: Mode = "top1"
    temperature: float = 1.0
    abstain: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ArgumentError(f"mode must be 'top1' or 'softmax', got {self.mode!r}")
        if not number(self.temperature) > 0:
            raise ArgumentError(f"temperature must be a finite number > 0, got {self.temperature!r}")
        if not 0 <= number(self.abstain) <= 1:
            raise ArgumentError(f"abstain must be a probability, got {self.abstain!r}")
        if not isinstance(self.tasks, tuple | list) or not all(isinstance(task, str) for task in self.tasks):
            raise ArgumentError(f"tasks must be the names of the columns, got {self.tasks!r:.100}")
        for name in ("temperature", "abstain"):  # as floats, which are written as numbers
            object.__setattr__(self, name, number(getattr(self, name)))
        self._check_tensors()

    @classmethod
    def fit(
        cls,
        features: Tensor,
        tasks: Sequence[str],
        *,
        hidden: int = 128,
        steps: int = 100,
        learning_rate: float = 1e-2,
        weight_decay: float = 1e-2,
        seed: int = 0,
    ) -> Router:
        """Train a router on features (N, D) and the task name of each sample; full-batch AdamW on cross-entropy.

        About fifty samples a task suffice (section 4.3 of arXiv 2411.16815). A feature that is constant in them has no
        say later either: nothing tells what its changes mean. Tasks keep the order in which they first
        appear. The result depends on the arguments only: torch's global random state is neither read nor changed.

        Raises ArgumentError for features that are not a finite (N, D) matrix or do not fit ``tasks``.
        """
        features = _checked(features)
        names = _names(tasks, len(features))
        hidden, steps = whole_number("hidden", hidden, 1), whole_number("steps", steps, 1)
        seed = whole_number("seed", seed, 0)
        for name, rate in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            if not number(rate) >= 0:
                raise ArgumentError(f"{name} must be a finite number of at least 0, got {rate!r}")
        known = tuple(dict.fromkeys(names))
        # Whatever the caller's modes are; the optimizer makes tensors, too.
        with torch.inference_mode(False), torch.enable_grad(), without_autocast("cpu"), torch.device("cpu"):
            features = features.detach().float().cpu()
            target = torch.tensor([known.index(name) for name in names], device="cpu")
            width = features.shape[1]
            center, spread = features.mean(0), features.std(0, correction=0)
            if not (torch.isfinite(center).all() and torch.isfinite(spread).all()):
                raise ArgumentError("features must have a finite mean and deviation in float32")
            noise = partial(torch.randn, generator=torch.Generator().manual_seed(seed % (1 << 63)), dtype=torch.float32)
            tensors = {
                "center": center,
                "spread": _without_constants(spread, features.abs().amax(0)),
                "hidden.weight": noise(hidden, width) * math.sqrt(2 / width),
                "hidden.bias": torch.zeros(hidden, dtype=torch.float32, device="cpu"),
                "output.weight": noise(len(known), hidden) / math.sqrt(hidden),
                "output.bias": torch.zeros(len(known), dtype=torch.float32, device="cpu"),
            }
            trained = [tensors[name].requires_grad_() for name in TENSORS[2:]]
            optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            router = cls(known, tensors)
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(router.logits(features), target).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ArgumentError(f"learning_rate: what is trained did not stay finite, with {learning_rate!r}")
        return cls(known, {name: tensor.detach() for name, tensor in tensors.items()})

    def logits(self, features: Tensor) -> Tensor:
        """Scores of each task, (N, K) float32, on the device of ``features``."""
        if not isinstance(features, Tensor):
            raise ArgumentError(f"features must be a tensor, got {type(features).__name__}")
        weights = {name: tensor.to(features.device) for name, tensor in self.tensors.items()}
        if features.ndim != 2 or features.shape[1] != len(weights["center"]):
            raise ArgumentError(f"features must be (N, {len(weights['center'])}), got {tuple(features.shape)}")
        with without_autocast(features.device):
            standard = (features.float() - weights["center"]) / weights["spread"]
            activations = F.relu(F.linear(standard, weights["hidden.weight"], weights["hidden.bias"]))
            return F.linear(activations, weights["output.weight"], weights["output.bias"])

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Expert weights of each sample, (N, K) float32.

        Raises ArgumentError for misshapen features, and where they or the temperature leave no finite probabilities.
        """
        probabilities = torch.softmax(self.logits(_checked(features)) / self.temperature, dim=1)
        if not torch.isfinite(probabilities).all():
            raise ArgumentError(f"features or temperature: scores / {self.temperature:g} give no finite probabilities")
        weights = probabilities
        if self.mode == "top1":
            weights = F.one_hot(probabilities.argmax(1), len(self.tasks)).float()
        confident = probabilities.amax(1, keepdim=True) >= self.abstain
        return torch.where(confident, weights, 0.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the router as one safetensors file, its options as JSON in the header.

        It replaces another router at once. Raises RefusedError if ``path`` is any other file.
        """
        path = path_of("path", path)
        if os.path.isfile(path):
            try:
                self.load(path)
            except CheckpointError as error:
                raise RefusedError(f"{error}; it is not replaced") from None
        options = {"tasks": self.tasks, "mode": self.mode, "temperature": self.temperature, "abstain": self.abstain}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.tensors.items()}
        write_file(path, save(tensors, metadata={"format": FORMAT, "options": json.dumps(options)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Router:
        """Read a router back. Raises CheckpointError, naming the file, if it is not one."""
        path = path_of("path", path)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"router {path}: {error}") from None
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"router {path}: format is {metadata.get('format')!r}, expected {FORMAT!r}")
        try:
            options = json.loads(metadata["options"])
            return cls(**options | {"tasks": tuple(options["tasks"])}, tensors=tensors)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"router {path}: {error}") from None

    def _check_tensors(self) -> None:
        if not isinstance(self.tensors, Mapping) or set(self.tensors) != set(TENSORS):
            got = ", ".join(map(str, self.tensors)) if isinstance(self.tensors, Mapping) else repr(self.tensors)
            raise ArgumentError(f"tensors must be {', '.join(TENSORS)}, got {got:.100}")
        for name in TENSORS:
            dense(self.tensors[name], f"tensors: {name}")
        if self.tensors["hidden.weight"].ndim != 2:
            raise ArgumentError(f"hidden.weight must be a matrix, got {tuple(self.tensors['hidden.weight'].shape)}")
        hidden, width = self.tensors["hidden.weight"].shape
        shapes = ((width,), (width,), (hidden, width), (hidden,), (len(self.tasks), hidden), (len(self.tasks),))
        for name, shape in zip(TENSORS, shapes, strict=True):
            if tuple(self.tensors[name].shape) != shape:
                raise ArgumentError(f"{name} must have shape {shape}, got {tuple(self.tensors[name].shape)}")
            if self.tensors[name].dtype != torch.float32 or not torch.isfinite(self.tensors[name]).all():
                raise ArgumentError(f"{name} must hold finite floats in float32, got {self.tensors[name].dtype}")


def _without_constants(spread: Tensor, largest: Tensor) -> Tensor:
    """The deviation of each feature, and so large a number for those that are constant but for rounding that they have
    no say, whatever they are later. ``largest``: the size of each."""
    constant = spread <= CONSTANT * largest
    if not constant.all():
        constant |= spread <= CONSTANT * spread[~constant].median()
    return spread.masked_fill(constant, torch.finfo(torch.float32).max)


def _names(tasks: object, count: int) -> list[str]:
    """The task of each of ``count`` samples."""
    if isinstance(tasks, str) or not isinstance(tasks, Collection) or not all(isinstance(name, str) for name in tasks):
        raise ArgumentError(f"tasks must be a list of names, the task of each sample, got {tasks!r:.100}")
    if len(tasks) != count or not count:
        raise ArgumentError(f"tasks must name a task for each of {counted(count, 'sample')}, got {len(tasks)}")
    return list(tasks)


def _checked(features: Tensor) -> Tensor:
    features = dense(features, "features")
    if features.ndim != 2 or not features.shape[1] or not features.is_floating_point():
        raise ArgumentError(f"features must be a floating (N, D) matrix, got {features.dtype} {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise ArgumentError("features must be finite")
    return features


class _Reached(Exception):
    """Ends a forward pass at a submodule and carries its output out; not an error."""

    def __init__(self, output: object) -> None:
        self.output = output


class PooledState:
    """Features of a batch: the output of one submodule of ``model``, pooled to one vector per sample.

    Call it with the model's own arguments; the forward pass ends at the submodule. An output (N, T, D) is averaged over
    T, leaving out the positions where the keyword argument ``attention_mask`` (N, T) is zero; (N, C, H, W) over H and
    W; (N, D) is used as it is. ``pool="first"`` takes position 0 of (N, T, D), a class token. Of a tuple or a mapping,
    the first tensor is used.

    Raises ArgumentError if the model has no such submodule, a forward pass does not reach it, or its output has other
    positions than the mask.
    """

    def __init__(self, model: nn.Module, submodule: str, pool: Pool = "mean") -> None:
        if pool not in get_args(Pool):
            raise ArgumentError(f"pool must be 'mean' or 'first', got {pool!r}")
        try:
            self._target = model.get_submodule(submodule)
        except AttributeError:
            raise ArgumentError(f"submodule {submodule!r} is not in {type(model).__name__}") from None
        model = getattr(model, "_orig_mod", model)  # graphs of torch.compile do not know of hooks
        if self._target in compiled(model):
            raise ArgumentError(f"submodule {submodule!r} is compiled: give features as a function of the arguments")
        self.model, self.submodule, self.pool = model, submodule, pool

    @torch.no_grad()
    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """(N, D) float32 features."""
        handle = self._target.register_forward_hook(_stop)
        try:
            self.model(*args, **kwargs)
        except _Reached as reached:
            mask, states = kwargs.get("attention_mask"), next(_tensors(reached.output), None)
            if states is None:
                kind = type(reached.output).__name__
                raise ArgumentError(f"submodule {self.submodule!r} gives no tensor, but {kind}") from None
            return pooled(states, mask if isinstance(mask, Tensor) else None, self.pool)
        finally:
            handle.remove()
        raise ArgumentError(f"submodule {self.submodule!r} is not part of this forward pass")


def _stop(module: nn.Module, args: object, output: object) -> None:
    raise _Reached(output)


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors in tuples, lists and mappings, in their order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list | Mapping):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)


def pooled(states: Tensor, mask: Tensor | None, pool: Pool) -> Tensor:
    """One float32 vector per sample from the states of a layer, see :class:`PooledState`."""
    states = states.float()
    if states.ndim == 2:
        return states
    if states.ndim == 4:
        return states.mean((2, 3))
    if states.ndim != 3:
        raise ArgumentError(f"a hidden state must have 2, 3 or 4 dimensions, got shape {tuple(states.shape)}")
    if pool == "first":
        return states[:, 0]
    if mask is None:
        return states.mean(1)
    if mask.shape != states.shape[:2]:
        raise ArgumentError(
            f"attention_mask has shape {tuple(mask.shape)}, the hidden state {tuple(states.shape)}: give features as a "
            "function of the arguments"
        )
    weight = mask.to(states.dtype).unsqueeze(-1)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1.0)
