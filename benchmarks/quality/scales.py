"""Accuracy of merged models against their scale, in units of the scale that needs no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import freemerge as fm
from freemerge.demo import TASKS, Digits, fine_tune, pretrain
from freemerge.merging.run import open_merger
from freemerge.methods import METHODS

from .measure import MODALITIES
from .suite import Suite

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3)
DIGITS = "digits"  #: those of ``freemerge demo``

State = Mapping[str, Tensor]
Score = Callable[[State], float]


def measure_scales(
    on: str, seeds: Sequence[int], cache: Path, test: int, methods: Sequence[str] = tuple(METHODS)
) -> str:
    """A table: a row for each method, a column for each share of its scale "auto"; mean over tasks and seeds, percent.

    For methods whose scale is a projection, the shares are of the projection itself (see :attr:`Method.regained`). The
    last two columns are the scale "interference" and the accuracy at it.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in methods}
    scales: dict[str, list[float]] = {name: [] for name in methods}
    least: dict[str, list[float]] = {name: [] for name in methods}
    for base, models, score in _suites(on, seeds, cache, test):
        for name in methods:
            recipe = fm.Recipe(method=name)
            scales[name].append(_scale(base, models, recipe) / METHODS[name].regained)
            least[name].append(_scale(base, models, recipe.replace(scale="interference")))
            merged = fm.merge(base, models, recipe.replace(scale=1.0))
            factors = [*(share * scales[name][-1] for share in SHARES), least[name][-1]]
            found[name].append(
                [score({n: base[n] + factor * (merged[n] - base[n]) for n in base}) for factor in factors]
            )
    lines = [
        f"| method | scale | {' | '.join(map(str, SHARES))} | interference | at it |",
        "|---" * (len(SHARES) + 4) + "|",
    ]
    for name in methods:
        means = [fmean(column) for column in zip(*found[name], strict=True)]
        cells = [f"{fmean(scales[name]):.2f}", *(f"{mean:.1f}" for mean in means)]
        cells.insert(-1, f"{fmean(least[name]):.2f}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _scale(base: State, models: list[State], recipe: fm.Recipe) -> float:
    with ExitStack() as stack:
        return open_merger(stack, base, models, recipe).measure().scale


def _suites(on: str, seeds: Sequence[int], cache: Path, test: int) -> Iterator[tuple[State, list[State], Score]]:
    """For each seed the base, the fine-tuned models, and what scores merged weights."""
    for seed in seeds:
        if on == DIGITS:
            yield _digits(seed)
            continue
        modality = MODALITIES[on]
        suite = modality.build(cache, modality.tasks, seed, modality.steps, test)

        def score(state: State, suite: Suite = suite) -> float:
            vector = {name: state[name] - suite.base[name] for name in suite.base}
            return fmean(suite.accuracies([[vector]] * len(suite.names), suite.test))

        yield suite.base, [*suite.models], score


def _digits(seed: int) -> tuple[State, list[State], Score]:
    torch.set_num_threads(1)  # more are slower on layers this small
    data = Digits(seed)
    base = pretrain(data, seed)
    return (
        base,
        [fine_tune(data, base, name, seed) for name in TASKS],
        lambda state: fmean(data.accuracy(state, name) for name in TASKS),
    )
