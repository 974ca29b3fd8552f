"""The methods that are compared: what each keeps for all tasks, what it keeps for each, and the bytes of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

import freemerge as fm
from freemerge.experts import Expert, extract_experts
from freemerge.tuning import By, LogitFunction

from .suite import TaskVector

SUM_SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)  # of methods that sum task vectors; six candidates for each
STOCK_SCALES = (1.0, 3.0, 8.0, 20.0, 45.0, 100.0)  # of Model Stock, which shrinks the sum of models that differ
SPARSE_SCALES = (0.3, 0.5, 0.8, 1.2, 1.6, 2.0)  # of those that sum what is left of them
UNIT_SCALES = (0.5, 0.7, 1.0, 1.5, 2.0, 2.5)  # of methods whose papers merge at scale 1
EQUAL_SCALES = (1.0, 1.5, 2.0, 2.5, 4.0, 6.0)  # of those that make singular values nearly equal
MEAN_SCALES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)  # of methods whose weights sum to one


@dataclass
class Inputs:
    """One seed's weights, and the tuned scales of the static methods measured so far."""

    base: TaskVector
    models: dict[str, TaskVector]
    scales: dict[str, float] = field(default_factory=dict)
    unlabelled: LogitFunction | None = None
    _merged: dict[str, TaskVector] = field(default_factory=dict)

    @property
    def vectors(self) -> list[TaskVector]:
        return [{name: model[name] - self.base[name] for name in self.base} for model in self.models.values()]

    def merged(self, name: str, scale: float | None = None) -> TaskVector:
        """The task vector of a static method, at its tuned scale if none is given."""
        if name not in self._merged:  # at scale 1, kept for the next who asks
            self._merged[name] = STATIC[name].merge(self)
        if scale is None and name not in self.scales:
            raise SystemExit(f"{name!r} has to be measured first: the experts stand on it")
        factor = self.scales[name] if scale is None else scale
        return {key: factor * tensor for key, tensor in self._merged[name].items()}


@dataclass(frozen=True)
class Static:
    """One model for all tasks: theta_0 + scale * what the recipe merges at scale 1.

    ``candidates``: of the scale that is tuned; the scale that the recipe finds without data is measured beside it.
    ``permuted``: with rows and columns in random order while the method sees them, so that frequency means nothing.
    """

    name: str
    recipe: fm.Recipe
    candidates: tuple[float, ...]
    permuted: bool = False

    def merge(self, inputs: Inputs) -> TaskVector:
        """The merged task vector at scale 1."""
        return self._merged(inputs, self.recipe.replace(scale=1.0))

    def data_free(self, inputs: Inputs, merged: TaskVector) -> float:
        """The scale that the recipe finds by itself, given what it merges at scale 1."""
        scale = self.recipe.global_scale(len(inputs.models))
        if scale is not None:
            return scale
        return norm(self._merged(inputs, self.recipe)) / norm(merged)

    def _merged(self, inputs: Inputs, recipe: fm.Recipe) -> TaskVector:
        return (_permuted if self.permuted else _merged)(inputs, recipe)


@dataclass(frozen=True)
class Kept:
    """What a method keeps for each task beside the base: task vectors to add up, and its own bytes on disk."""

    parts: list[list[TaskVector]]
    bytes_per_task: float
    experts: dict[str, Expert] | None = None


@dataclass(frozen=True)
class Specific:
    """What is no plain merge: above all what is kept for each task, beside the ``backbone``.

    That is a static method, which serves all tasks; None: the base.
    """

    name: str
    build: Callable[[Inputs], Kept]
    backbone: str | None = None
    routed: bool = False


def _merged(inputs: Inputs, recipe: fm.Recipe) -> TaskVector:
    merged = fm.merge(inputs.base, list(inputs.models.values()), recipe)
    return {name: merged[name] - weights for name, weights in inputs.base.items()}


def _permuted(inputs: Inputs, recipe: fm.Recipe, seed: int = 0) -> TaskVector:
    """The same, with rows and columns in random order while it is merged."""
    generator = torch.Generator().manual_seed(seed)
    order = {
        name: [torch.randperm(side, generator=generator) for side in tensor.shape]
        for name, tensor in inputs.base.items()
        if tensor.ndim == 2
    }

    def shuffled(weights: TaskVector) -> TaskVector:
        return {
            name: tensor[order[name][0]][:, order[name][1]] if name in order else tensor
            for name, tensor in weights.items()
        }

    models = {name: shuffled(model) for name, model in inputs.models.items()}
    merged = _merged(Inputs(shuffled(inputs.base), models), recipe)
    return {
        name: tensor[order[name][0].argsort()][:, order[name][1].argsort()] if name in order else tensor
        for name, tensor in merged.items()
    }


def norm(vector: TaskVector) -> float:
    """The Frobenius norm of all tensors together."""
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in vector.values()))


def on(backbone: str | None, *, scale: float | None = None, **options: Any) -> Callable[[Inputs], Kept]:
    """Experts on a merged model, at its tuned ``scale`` or a given one: options of ``freemerge.extract_experts``."""

    def build(inputs: Inputs) -> Kept:
        nothing = {name: torch.zeros_like(tensor) for name, tensor in inputs.base.items()}
        shared = nothing if backbone is None else inputs.merged(backbone, scale)
        merged = {name: tensor + shared[name] for name, tensor in inputs.base.items()}
        needed = {"budget", "rank"} & set(options) or options.get("values") in ("mask", "gains")
        experts = extract_experts(inputs.base, inputs.models, backbone=merged if needed else None, **options)
        parts = [[shared, nothing | expert.dense(shared)] for expert in experts.values()]
        return Kept(parts, _file_bytes(experts), experts)

    return build


def adamerging(by: By) -> Callable[[Inputs], Kept]:
    """One model whose weights are learnt from unlabelled validation examples."""

    def build(inputs: Inputs) -> Kept:
        assert inputs.unlabelled is not None
        models, recipe = list(inputs.models.values()), fm.Recipe(method="task_arithmetic")
        tuned = fm.tune(inputs.base, models, recipe, inputs.unlabelled, by=by, iterations=60, rate=0.02)
        return Kept([[_merged(inputs, tuned.recipe)]] * len(models), 0.0)

    return build


def twin_sparse(density: float) -> Callable[[Inputs], Kept]:
    """Twin-Merging: exclusive parts theta_i - theta_shared, the largest entries of the model, as our experts."""

    def build(inputs: Inputs) -> Kept:
        shared = inputs.merged("Task Arithmetic")
        start = {name: tensor + shared[name] for name, tensor in inputs.base.items()}
        experts = extract_experts(start, inputs.models, density=density, scope="model", rescale=1.0, values="fp16")
        nothing = {name: torch.zeros_like(tensor) for name, tensor in inputs.base.items()}
        return Kept([[shared, nothing | expert.dense()] for expert in experts.values()], _file_bytes(experts), experts)

    return build


def _file_bytes(experts: Mapping[str, Expert]) -> float:
    """Mean size of the experts' files."""
    with TemporaryDirectory() as folder:
        return fmean(expert.save(f"{folder}/{name}.safetensors") for name, expert in experts.items())


FR = {"weights": "magnitude", "renormalize": "energy"}
ELECTED = "EMR without masks"
PERMUTED = "FR-Merging, rows and columns permuted"
UNFILTERED = "FR-Merging without its filter"
BUDGETS = ("0.15 %", "0.3 %", "0.6 %", "1 %")


def least(**options: Any) -> fm.Recipe:
    """A method whose best scale without data is that of the least interference."""
    return fm.Recipe(**options, scale="interference")


_STATIC = (
    Static("weight average", fm.Recipe(method="average"), (1.0,)),
    Static("Task Arithmetic", least(method="task_arithmetic"), SUM_SCALES),
    Static("TIES, top 20 %", least(method="ties"), UNIT_SCALES),
    Static("DARE, p = .9", least(method="dare"), SUM_SCALES),
    Static("DARE with elected signs", least(method="dare", sign_election=True), SUM_SCALES),
    Static("Breadcrumbs", least(method="breadcrumbs"), SPARSE_SCALES),
    Static("Model Stock", least(method="model_stock"), STOCK_SCALES),
    Static("PCB, top 10 %", least(method="pcb"), UNIT_SCALES),
    Static("FR-Merging", least(), MEAN_SCALES),
    Static("Iso-C", fm.Recipe(method="iso_c"), EQUAL_SCALES),
    Static("Iso-CTS", fm.Recipe(method="iso_cts"), EQUAL_SCALES),
    Static("TSV-M", least(method="tsv_m"), EQUAL_SCALES),
    Static("WUDI", least(method="wudi"), UNIT_SCALES),
    Static("JSV", fm.Recipe(method="jsv"), EQUAL_SCALES),
    Static(ELECTED, least(method="emr"), SUM_SCALES),
    Static(UNFILTERED, least(response=fm.HighPass(0), **FR), MEAN_SCALES),
    Static(PERMUTED, least(), MEAN_SCALES, permuted=True),
    Static("row means removed, nothing else", least(response=fm.Center(-1), **FR), MEAN_SCALES),
)
STATIC = {method.name: method for method in _STATIC}

_SPECIFIC = (
    Specific("AdaMerging, by task, unlabelled data", adamerging("task")),
    Specific("AdaMerging, by layer, unlabelled data", adamerging("layer")),
    Specific("EMR", on(ELECTED, scale=1.0, values="mask"), ELECTED),
    Specific("Twin, sparse 1 %", twin_sparse(0.01), "Task Arithmetic"),
    Specific("Twin, SVD rank 3", on("Task Arithmetic", rank=3, values="svd16"), "Task Arithmetic"),
    Specific("FREE, 1 %", on("FR-Merging"), "FR-Merging", routed=True),
    Specific("FREE, 1 %, released mu", on("FR-Merging", rescale="released"), "FR-Merging"),
    Specific("FREE, 1 %, paper's mu", on("FR-Merging", rescale="paper"), "FR-Merging"),
    Specific("FREE, 1 % signs", on("FR-Merging", values="sign"), "FR-Merging"),
    Specific("FREE, 1 %, no filter", on(UNFILTERED), UNFILTERED),
    Specific("FREE, 1 %, permuted", on(PERMUTED), PERMUTED),
    Specific("FREE, 1 %, on the base", on(None)),
    Specific("Iso-C + 1 % signs", on("Iso-C", values="sign"), "Iso-C"),
    *(
        Specific(f"Iso-C + low rank {budget}", on("Iso-C", budget=budget), "Iso-C", routed=budget == "0.6 %")
        for budget in BUDGETS
    ),
    Specific("FR-Merging + low rank 0.6 %", on("FR-Merging", budget="0.6 %"), "FR-Merging"),
    Specific("JSV + gains", on("JSV", values="gains"), "JSV", routed=True),
    *(Specific(f"JSV + gains {budget}", on("JSV", values="gains", budget=budget), "JSV") for budget in BUDGETS),
    Specific("TSV-M + gains", on("TSV-M", values="gains"), "TSV-M"),
)
SPECIFIC = {method.name: method for method in _SPECIFIC}
