"""Weights learnt from unlabelled data: AdaMerging (arXiv 2310.02575), for any method that is linear in them."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from .accumulate import add_round
from .arguments import function as check_function
from .arguments import number, whole_number
from .checkpoint import Source
from .dense import without_autocast
from .errors import ArgumentError
from .merging.engine import Merger
from .merging.recipe import Recipe, checked_recipe
from .merging.run import open_merger
from .merging.selection import LayerWeights
from .methods import Measured

LogitFunction = Callable[[dict[str, Tensor]], Iterable[Tensor]]
By = Literal["task", "layer"]

_LINEAR = "average, task_arithmetic, breadcrumbs, dare and fr can be, without sign election and with a filter before"
_LAYER = re.compile(r"(.*?(?<![^.])\d+)\.")  # up to the first number that is a whole part of a dotted name


@dataclass(frozen=True)
class Tuned:
    """What was learnt.

    ``recipe``: the recipe with the learnt weights, at scale 1, for :func:`freemerge.merge`. ``entropies``: the mean
    entropy of the predictions before each iteration, in nats.
    """

    recipe: Recipe
    entropies: tuple[float, ...]


@torch.inference_mode(False)  # weights that are learnt have gradients
def tune(
    base: Source,
    models: Sequence[Source],
    recipe: Recipe,
    function: LogitFunction,
    *,
    by: By = "task",
    iterations: int = 100,
    rate: float = 0.01,
    backend: str = "auto",
) -> Tuned:
    """Learn the weights lambda_i that make a merged model's predictions on unlabelled data the most certain.

    The mean entropy of the predictions is minimised by Adam (arXiv 2310.02575), from the weights and scale of the
    recipe. K + 3 copies of the model in float32 are in memory. Tensors that are copied, and running statistics, stay
    those of the recipe's merge meanwhile.

    Args:
        base, models, backend: as for :func:`freemerge.merge`.
        recipe: a method whose merge is linear in the weights: "average", "task_arithmetic", "breadcrumbs", "dare"
            without sign election, or "fr" with ``renormalize=None`` and without it; a filter may come before it. It
            has no ``layers``.
        function: called with a state dict as :func:`freemerge.merge` returns it, whose tensors require gradients;
            yields the logits [..., classes] of unlabelled batches, as a rule one of each task, each from a forward pass
            of its own (``torch.func.functional_call``), or returns those of a single batch. A class at -inf is ruled
            out. It is called once an iteration, and should go on with other batches. Gradients go to the state dict's
            tensors alone.
        by: one weight for each ``"task"``, or one for each task in each ``"layer"``: tensors that share their name up
            to the first number, as ``encoder.layer.3.``, are a layer; all others together are one more. The logits must
            depend on each; of tensors with action "copy" nothing is learnt.
        iterations, rate: of Adam.

    Raises:
        ArgumentError: a method that is not linear; batches that are no logits, do not depend on the weights, share a
            forward pass, or give entropies that are not finite. Otherwise as :func:`freemerge.merge`.
    """
    if by not in ("task", "layer"):
        raise ArgumentError(f"by must be 'task' or 'layer', got {by!r}")
    iterations = whole_number("iterations", iterations, 1)
    if not number(rate) > 0:
        raise ArgumentError(f"rate must be a finite number above 0, got {rate!r}")
    check_function("function", function)
    recipe = checked_recipe(recipe)
    if recipe.layers:
        raise ArgumentError("layers: these weights are what is learnt; start from a recipe without them")
    if not recipe.merging.linear:
        hint = recipe.method.linear_hint or _LINEAR
        raise ArgumentError(f"method {recipe.method.name} as it is here is not linear in the weights; {hint}")
    with ExitStack() as stack:
        merger = open_merger(stack, base, models, recipe, backend)
        measured = merger.measure()
        start = [measured.scale * weight for weight in measured.weights]
        parts = _parts(merger)
        if not parts:
            raise ArgumentError("select: every tensor is copied or left out, which leaves no weights to learn")
        patterns = list(dict.fromkeys(_pattern(name) for name in parts)) if by == "layer" else []
        group = {name: patterns.index(_pattern(name)) if patterns else 0 for name in parts}
        weights = torch.tensor([start] * max(1, len(patterns)), dtype=torch.float64, device="cpu")
        fixed = _fixed(merger, measured, parts)
        optimizer = torch.optim.Adam([weights], lr=rate)
        entropies: list[float] = []
        reached: set[int] = set()
        for _ in range(iterations):
            merged = {
                name: _merged(merger, name, _product(weights[group[name]].to(part.dtype), part))
                for name, part in parts.items()
            }
            entropies.append(_descend(merger, fixed, merged, function))
            reached |= {group[name] for name, tensor in merged.items() if tensor.grad is not None}
            if not reached:
                raise ArgumentError(
                    "the function's logits do not depend on the weights, of which load_state_dict makes copies; see "
                    "torch.func.functional_call"
                )
            weights.grad = torch.zeros_like(weights)
            for name, part in parts.items():
                gradient = merged[name].grad
                if gradient is not None:
                    flat = gradient.to(part.device, part.dtype).flatten()
                    weights.grad[group[name]] += _product(part.reshape(len(part), len(flat)), flat).double().cpu()
            optimizer.step()
    missed = [pattern or "all others" for i, pattern in enumerate(patterns) if i not in reached]
    if missed:
        raise ArgumentError(
            f"the function's logits do not depend on the weights of {', '.join(missed)}; action copy leaves them out"
        )
    learnt = dict(zip(patterns or [""], map(tuple, weights.tolist()), strict=True))
    others = learnt.pop("", tuple(start))
    layers = [LayerWeights(pattern, own) for pattern, own in learnt.items()]
    return Tuned(recipe.replace(weights=others, scale=1.0, layers=layers), tuple(entropies))


def _pattern(name: str) -> str:
    """What matches the names of a tensor's layer; nothing where it is in none."""
    found = _LAYER.match(name)
    return f"{glob.escape(found[1])}.*" if found else ""


def _parts(merger: Merger) -> dict[str, Tensor]:
    """For each merged tensor X_1 .. X_K [K, ...], of which the merged task vector is the weighted sum."""
    count = len(merger.models)
    parts: dict[str, Tensor] = {}
    for unit in merger.units:
        if unit.by_method:
            alone = [Measured(tuple(float(i == j) for j in range(count))) for i in range(count)]
            merged = [merger.method.merge(merger.vectors(unit), own).complete().tensors for own in alone]
            parts |= {name: torch.stack(part) for name, part in zip(unit.names, zip(*merged, strict=True), strict=True)}
    return parts


def _fixed(merger: Merger, measured: Measured, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that no weight changes while others are learnt."""
    fixed: dict[str, Tensor] = {}
    for unit in merger.units:
        if unit.names[0] not in parts:
            fixed |= merger.merged(unit, measured).tensors
    return fixed


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Over the last axis of the first and the first of the second, in their dtype: autocast is for the function."""
    with without_autocast(second.device):
        product: Tensor = torch.tensordot(first, second, 1)
        return product


def _merged(merger: Merger, name: str, delta: Tensor) -> Tensor:
    base = merger.base.read(name)
    merged = add_round(base.to(delta.device), delta, 1.0, merger.out_spec(name).dtype)
    return merged.to(merger.base.device(name)).requires_grad_()


def _descend(merger: Merger, fixed: dict[str, Tensor], merged: dict[str, Tensor], function: LogitFunction) -> float:
    """The mean entropy over the batches; its gradients are left in the merged tensors."""
    state = {**fixed, **merged}
    state |= {name: state[first] for name, first in merger.tied.items()}
    entropies = []
    with torch.enable_grad():
        batches = function(merger.base.restored(state))
        if not isinstance(batches, Iterable):
            raise ArgumentError(f"the function must yield the logits of batches, got {batches!r}")
        for logits in [batches] if isinstance(batches, Tensor) else batches:  # not its rows, which share a graph
            entropy = _entropy(logits)
            entropies.append(float(entropy.detach()))
            _backward(entropy, list(merged.values()))
    if not entropies:
        raise ArgumentError("the function must yield the logits of at least one batch")
    for tensor in merged.values():
        if tensor.grad is not None:
            tensor.grad /= len(entropies)
    return fmean(entropies)


def _backward(entropy: Tensor, merged: list[Tensor]) -> None:
    """Add to the gradients of the merged tensors, and of nothing else that the function works with."""
    try:
        entropy.backward(inputs=merged)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise ArgumentError(
            "the function's batches share a forward pass, of which only the first has gradients: yield each after one "
            "of its own"
        ) from error


def _entropy(logits: object) -> Tensor:
    """-sum p log p, the mean over a batch, in nats."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 1 or logits.shape[-1] < 2:
        raise ArgumentError(f"the function must yield logits [..., classes] of two classes or more, got {logits!r}")
    if not logits.requires_grad:
        raise ArgumentError("the function's logits do not depend on the weights; see torch.func.functional_call")
    log = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    log = log.clamp(min=torch.finfo(log.dtype).min)  # 0 log 0 is 0
    entropy = -(log.exp() * log).sum(-1).mean()
    if not entropy.isfinite():
        raise ArgumentError("the function's logits have no finite entropy")
    return entropy
