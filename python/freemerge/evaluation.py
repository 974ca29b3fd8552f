"""Scores merged models with the user's own function, and chooses a merge's scale by it."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryFile
from typing import Any

from torch import Tensor

from .arguments import function as check_function
from .arguments import path_of
from .checkpoint import Checkpoint, Source
from .errors import ArgumentError
from .experts import Expert, ExpertBank
from .merging.recipe import Recipe, checked_recipe
from .merging.run import merged_in_memory, open_merger
from .methods.parameters import NUMBERS

Scores = dict[str, float]
ScoreFunction = Callable[[dict[str, Tensor]], "float | Mapping[str, float]"]


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model, by the name of the task; higher is better."""

    label: str
    scores: Scores

    @property
    def mean(self) -> float:
        """The mean of the scores."""
        return fmean(self.scores.values())


@dataclass(frozen=True)
class Sweep:
    """A recipe at several scales. ``best`` is the recipe at the scale with the highest mean, the first of equals;
    ``evaluations`` are in the order of the scales."""

    best: Recipe
    evaluations: tuple[Evaluation, ...]


def evaluate(model: Source, function: ScoreFunction) -> Evaluation:
    """Score one model.

    Args:
        model: path of a checkpoint, state dict or module. Its tensors are handed to the function as they are stored,
            for reading only; they may be memory maps of the file.
        function: takes a state dict and returns a score, or a mapping from task to score; higher is better.

    Raises:
        ArgumentError: the function is none, or returns no finite numbers.
        CheckpointError: the model cannot be read.
    """
    check_function("function", function)
    with Checkpoint.open(model, argument="model") as opened:
        weights = {name: opened.read(name) for name in opened.specs}
        return Evaluation(opened.name, _scores(function(weights)))


def evaluate_experts(
    model: Source,
    experts: str | os.PathLike[str] | Mapping[str, Expert],
    function: ScoreFunction,
    *,
    base: Source | None = None,
    backbone: Source | None = None,
) -> Evaluation:
    """Score a merged model on each task with that task's expert switched on, as a perfect router would.

    ``experts``: a folder of expert files, or experts by name; the function must return a mapping with these names.
    ``base`` and ``backbone``: theta_0 and theta_m, which some experts need, as for :class:`freemerge.ExpertBank`. The
    weights are copied, and the function sees one expert at a time. Otherwise as :func:`evaluate`. The errors of a real
    router are not included: measure them with :class:`freemerge.RoutedModel`.
    """
    check_function("function", function)
    with Checkpoint.open(model, argument="model") as opened:
        # A copy of the module, as only a module knows where experts with the names of its files belong.
        module = None if opened.module is None else copy.deepcopy(opened.module)
        stored = module.state_dict() if module is not None else _copied(opened)
        weights = {name: tensor.detach() for name, tensor in stored.items()}
        attached = module if module is not None else weights
        if isinstance(experts, Mapping):
            bank = ExpertBank(attached, experts, base=base, backbone=backbone)
        else:
            bank = ExpertBank.load(attached, path_of("experts", experts), base=base, backbone=backbone)
        if not bank:
            raise ArgumentError("experts must hold at least one expert")
        scores = {}
        for task in bank:
            with bank.active(task):
                found = _scores(function(weights))
            if task not in found:
                raise ArgumentError(f"the function returned no score for the expert {task!r}, only {', '.join(found)}")
            scores[task] = found[task]
        return Evaluation(f"{opened.name} with experts", scores)


def sweep(
    base: Source,
    models: Sequence[Source],
    recipe: Recipe,
    scales: Sequence[float],
    function: ScoreFunction,
    *,
    backend: str = "auto",
) -> Sweep:
    """Merge, and score the result at every scale, on data that no reported number is measured on.

    What is merged waits in a temporary file of a float32 model's size; what does not fit there is merged again.
    ``base``, ``models``, ``recipe`` and ``backend`` as for :func:`freemerge.merge`, ``function`` as for
    :func:`evaluate`. Raises what they raise, and ArgumentError for scales that are no list of numbers, and for scores
    of other tasks at another scale.
    """
    if NUMBERS.convert(scales) is None:
        raise ArgumentError(f"scales must be {NUMBERS.words}, got {scales!r}")
    check_function("function", function)
    recipe = checked_recipe(recipe)
    recipes = [recipe.replace(scale=scale) for scale in scales]
    evaluations: list[Evaluation] = []
    with ExitStack() as stack:
        merger = open_merger(stack, base, models, recipes[0], backend)
        measured = merger.measure()
        kept = merger.keep_in(stack.enter_context(TemporaryFile(buffering=0)))
        for unit in merger.units:
            if unit.by_method:
                kept.put(unit.names, merger.task_vectors(unit, measured))
        for scale in map(float, scales):
            scores = _scores(function(merged_in_memory(merger, replace(measured, scale=scale))))
            if evaluations and scores.keys() != evaluations[0].scores.keys():
                names = [", ".join(found) for found in (evaluations[0].scores, scores)]
                raise ArgumentError(
                    f"the function must score the same tasks at every scale, got {' and then '.join(names)}"
                )
            evaluations.append(Evaluation(f"scale {scale:g}", scores))
    best = max(range(len(recipes)), key=lambda index: evaluations[index].mean)
    return Sweep(recipes[best], tuple(evaluations))


def load_function(reference: str) -> Callable[[dict[str, Tensor]], Any]:
    """The function named by ``"path/to/file.py:function"`` or ``"package.module:function"``; executes that file, which
    may import modules of its own folder meanwhile, as a script may.

    Raises ArgumentError if there is no such file, module or function.
    """
    place, separator, name = reference.rpartition(":")
    relative = place.startswith(".") and not place.endswith(".py")
    if not separator or not place or not name or relative:
        raise ArgumentError(f"function must be FILE.py:NAME or MODULE:NAME, got {reference!r}")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, FileNotFoundError) as error:
        raise ArgumentError(f"function {reference}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ArgumentError(f"function {reference}: {place} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def table(evaluations: Sequence[Evaluation]) -> str:
    """One row a model, one column a task, as aligned text."""
    tasks = list(dict.fromkeys(task for evaluation in evaluations for task in evaluation.scores))
    rows = [["model", *tasks, "mean"]] if len(tasks) > 1 else [["model", *tasks]]
    for evaluation in evaluations:
        cells = [f"{evaluation.scores[task]:.4g}" if task in evaluation.scores else "" for task in tasks]
        rows.append([evaluation.label, *cells, *([f"{evaluation.mean:.4g}"] if len(tasks) > 1 else [])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in aligned).rstrip()
        for aligned in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    )


def _copied(opened: Checkpoint) -> dict[str, Tensor]:
    """Copies of all tensors, tied as they are."""
    copies = {name: opened.read(name).clone() for name in opened.specs if name not in opened.tied}
    return copies | {name: copies[first] for name, first in opened.tied.items()}


def _scores(returned: float | Mapping[str, float]) -> Scores:
    found = returned if isinstance(returned, Mapping) else {"score": returned}
    try:
        scores = {str(task): float(score) for task, score in found.items()}
    except (OverflowError, TypeError, ValueError):
        raise ArgumentError(f"the function must return a number or a mapping of numbers, got {returned!r}") from None
    if len(scores) < len(found):
        raise ArgumentError(f"the function must return a score for each name, got two for one in {returned!r}")
    if not scores or not all(map(math.isfinite, scores.values())):
        raise ArgumentError(f"the function must return finite scores, got {returned!r}")
    return scores


def _from_file(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"_freemerge_function_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up by its name
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # as python FILE does
    try:
        spec.loader.exec_module(module)
    finally:
        with suppress(ValueError):  # the file may change the list itself
            sys.path.remove(folder)
    return module
