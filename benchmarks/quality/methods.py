"""The methods that are compared: what each keeps for all tasks, what it keeps for each, and the bytes of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

import freemerge as fm
from freemerge.experts import Expert, extract_experts

from . import rivals
from .rivals import TaskVector

SUM_SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)  # of methods that sum task vectors; six candidates for every method
UNIT_SCALES = (0.8, 1.0, 1.5, 2.0, 2.5, 3.0)  # of methods whose papers merge at scale 1
MEAN_SCALES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)  # of methods whose weights sum to one
STRONG_SCALES = (3.0, 4.0, 5.0, 6.0, 7.0, 8.0)  # of those whose filter removes so much that more is needed
RELEASED_SCALES = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2)
MU = (3.0, 5.0, 7.0, 9.0, 12.0, 15.0)


@dataclass
class Inputs:
    """One seed's weights, and the tuned scales of the static methods measured so far."""

    base: TaskVector
    models: dict[str, TaskVector]
    scales: dict[str, float] = field(default_factory=dict)
    _merged: dict[str, TaskVector] = field(default_factory=dict)

    @property
    def vectors(self) -> list[TaskVector]:
        return [{name: model[name] - self.base[name] for name in self.base} for model in self.models.values()]

    def merged(self, name: str) -> TaskVector:
        """The task vector of a static method, at its tuned scale; kept for the next who asks."""
        if name not in self._merged:
            if name not in self.scales:
                raise SystemExit(f"{name!r} has to be measured first: the experts stand on it")
            (method,) = [method for method in STATIC if method.name == name]
            self._merged[name] = {key: self.scales[name] * tensor for key, tensor in method.merge(self).items()}
        return self._merged[name]


@dataclass(frozen=True)
class Static:
    """One model for all tasks: theta_0 + scale * merge(inputs), the scale tuned among ``candidates``."""

    name: str
    merge: Callable[[Inputs], TaskVector]
    candidates: tuple[float, ...]


@dataclass(frozen=True)
class Kept:
    """What a method keeps for each task beside the base: task vectors to add up, and its own bytes on disk."""

    parts: list[list[TaskVector]]
    bytes_per_task: float
    experts: dict[str, Expert] | None = None


@dataclass(frozen=True)
class Specific:
    """Something kept for each task; ``candidates`` of its one tuned number, if it has one."""

    name: str
    build: Callable[[Inputs, float], Kept]
    candidates: tuple[float, ...] = (1.0,)
    routed: bool = False


def recipe_merge(recipe: fm.Recipe) -> Callable[[Inputs], TaskVector]:
    """The task vector that freemerge merges by a recipe, at scale 1."""

    def merge(inputs: Inputs) -> TaskVector:
        merged = fm.merge(inputs.base, list(inputs.models.values()), recipe.replace(scale=1.0))
        return {name: merged[name] - weights for name, weights in inputs.base.items()}

    return merge


def permuted_merge(recipe: fm.Recipe, seed: int = 0) -> Callable[[Inputs], TaskVector]:
    """The control: rows and columns in random order while the filter sees them, so frequency means nothing."""
    inner = recipe_merge(recipe)

    def merge(inputs: Inputs) -> TaskVector:
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

        merged = inner(Inputs(shuffled(inputs.base), {name: shuffled(m) for name, m in inputs.models.items()}))
        return {
            name: tensor[order[name][0].argsort()][:, order[name][1].argsort()] if name in order else tensor
            for name, tensor in merged.items()
        }

    return merge


def emr(inputs: Inputs, _: float) -> Kept:
    result = rivals.emr(inputs.vectors)
    return Kept([[vector] for vector in result.vectors], result.bytes_per_task)


def low_rank(backbone: str, **size: Any) -> Callable[[Inputs, float], Kept]:
    """The first singular vectors of theta_i - theta_m, within a ``budget`` or of a ``rank``."""

    def build(inputs: Inputs, _: float) -> Kept:
        shared = inputs.merged(backbone)
        merged = {name: tensor + shared[name] for name, tensor in inputs.base.items()}
        return _kept(shared, inputs.base, extract_experts(inputs.base, inputs.models, backbone=merged, **size))

    return build


def twin_svd(rank: int) -> Callable[[Inputs, float], Kept]:
    """Twin-Merging (Lu et al., arXiv 2406.15479): a rank of what the merged model lacks, in float16."""
    return low_rank("Task Arithmetic", rank=rank, values="svd16")


def twin_sparse(density: float) -> Callable[[Inputs, float], Kept]:
    """Exclusive parts theta_i - theta_shared, the largest entries of the model, in the files of our experts."""

    def build(inputs: Inputs, _: float) -> Kept:
        shared = inputs.merged("Task Arithmetic")
        start = {name: tensor + shared[name] for name, tensor in inputs.base.items()}
        experts = extract_experts(start, inputs.models, density=density, scope="model", rescale=1.0, values="fp16")
        return _kept(shared, inputs.base, experts)

    return build


def free(
    rescale: Literal["auto", "released", "paper", "projection", "tuned"] = "released",
    *,
    density: float = 0.01,
    values: Literal["fp16", "sign"] = "fp16",
    backbone: str | None = "FR-Merging",
) -> Callable[[Inputs, float], Kept]:
    """FREE-Merging: experts on a merged backbone. ``rescale="tuned"`` takes mu from the tuned number."""

    def build(inputs: Inputs, mu: float) -> Kept:
        shared = inputs.merged(backbone) if backbone else {name: torch.zeros_like(t) for name, t in inputs.base.items()}
        merged = {name: tensor + shared[name] for name, tensor in inputs.base.items()}
        experts = extract_experts(
            inputs.base,
            inputs.models,
            density=density,
            rescale=mu if rescale == "tuned" else rescale,
            values=values,
            backbone=merged if rescale == "projection" else None,
        )
        return _kept(shared, inputs.base, experts)

    return build


def _kept(shared: TaskVector, base: TaskVector, experts: Mapping[str, Expert]) -> Kept:
    parts = []
    for expert in experts.values():
        dense = expert.dense()
        parts.append([shared, {name: dense.get(name, torch.zeros_like(tensor)) for name, tensor in base.items()}])
    return Kept(parts, _file_bytes(experts), dict(experts))


def _file_bytes(experts: Mapping[str, Expert]) -> float:
    """Mean size of the experts' files."""
    with TemporaryDirectory() as folder:
        return fmean(expert.save(f"{folder}/{name}.safetensors") for name, expert in experts.items())


def _by_name(method: str) -> Callable[[Inputs], TaskVector]:
    return recipe_merge(fm.Recipe(method=method))


def _fr(response: fm.Response) -> fm.Recipe:
    return fm.Recipe(response=response, weights="magnitude", renormalize="energy")


def _fr_at(cutoff: float, candidates: tuple[float, ...] = MEAN_SCALES) -> Static:
    return Static(f"FR, cutoff {cutoff}", recipe_merge(_fr(fm.HighPass(cutoff))), candidates)


STATIC = (
    Static("weight average", _by_name("average"), (1.0,)),
    Static("Task Arithmetic", _by_name("task_arithmetic"), SUM_SCALES),
    Static("TIES, top 20 %", _by_name("ties"), UNIT_SCALES),
    Static("DARE, p = .9", _by_name("dare"), SUM_SCALES),
    Static("PCB, top 10 %", _by_name("pcb"), UNIT_SCALES),
    Static("Iso-C", _by_name("iso_c"), UNIT_SCALES),
    Static("TSV-M", _by_name("tsv_m"), UNIT_SCALES),
    Static("no filter, weights of FR", recipe_merge(_fr(fm.HighPass(0))), MEAN_SCALES),
    *(_fr_at(cutoff) for cutoff in (0.05, 0.1, 0.2, 0.3)),
    Static("FR-Merging", recipe_merge(fm.Recipe()), MEAN_SCALES),
    _fr_at(0.5),
    _fr_at(0.6, STRONG_SCALES),
    Static(
        "FR as released (ViT-8 script)",
        recipe_merge(fm.Recipe(response=fm.Official(0.7), weights="sum", align=True, renormalize=None)),
        RELEASED_SCALES,
    ),
    Static("FR, cutoff 0.4, rows and columns permuted", permuted_merge(fm.Recipe()), STRONG_SCALES),
    Static("row means removed, nothing else", recipe_merge(_fr(fm.Center(-1))), MEAN_SCALES),
)

SPECIFIC = (
    Specific("EMR", emr, routed=True),
    Specific("Twin, sparse 1 %", twin_sparse(0.01)),
    Specific("Twin, sparse 10 %", twin_sparse(0.1)),
    Specific("Twin, SVD rank 3", twin_svd(3)),
    Specific("Twin, SVD rank 32", twin_svd(32)),
    Specific("FREE, 1 %, released mu", free("released"), routed=True),
    Specific("FREE, 1 %, auto mu", free("auto")),
    Specific("FREE, 1 %, paper's mu", free("paper")),
    Specific("FREE, 1 %, projection mu", free("projection")),
    Specific("FREE, 1 %, tuned mu", free("tuned"), MU),
    Specific("FREE, 1 % signs, released mu", free("released", values="sign"), routed=True),
    Specific("FREE, 1 % signs, tuned mu", free("tuned", values="sign"), MU),
    Specific("FREE, 0.25 %, released mu", free("released", density=0.0025)),
    Specific("FREE, 5 %, released mu", free("released", density=0.05)),
    Specific("experts on Iso-C, 1 % signs, released mu", free("released", values="sign", backbone="Iso-C")),
    *(
        Specific(f"experts on Iso-C, low rank {budget}", low_rank("Iso-C", budget=budget))
        for budget in ("0.15 %", "0.3 %", "0.6 %", "1 %")
    ),
    Specific("experts on FR-Merging, low rank 0.6 %", low_rank("FR-Merging", budget="0.6%")),
    Specific("experts without a filter", free("released", backbone="no filter, weights of FR")),
    Specific("experts on the base", free("released", backbone=None)),
)
