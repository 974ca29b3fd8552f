"""The analysis of models: one tensor at a time, then sums over groups of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..arguments import path_of
from ..checkpoint import Source
from ..checkpoint.target import check_file, refuse_paths, write_file
from ..errors import ArgumentError, CheckpointError, RefusedError
from ..merging.engine import Merger
from ..merging.progress import Progress
from ..merging.recipe import Recipe
from ..merging.run import open_merger
from ..methods import Measured, Method
from ..methods.fr import FR
from ..methods.iso import IsoC
from ..methods.rules import projection_scale
from ..methods.spectra import SpectralMethod
from ..methods.task_arithmetic import TaskArithmetic
from ..methods.vectors import TaskVectors
from ..responses import Center
from .advice import advise
from .bands import band_sums
from .entries import entry_sums
from .measures import Measures, measures_of
from .names import depth, module_type
from .report.pictures import check_matplotlib, pictures
from .result import Analysis, TensorMeasures
from .singular import singular_sums
from .sums import EDGES, RANKS, Sums

T = TypeVar("T")

SLOWNESS = 10.0  # roughly, of a byte that is analysed to one that is measured, until the first was

METHODS: Mapping[str, Method] = {
    "Task Arithmetic": TaskArithmetic(),
    "row means removed": FR(Center(-1)),
    "FR-Merging": FR(),
    "Iso-C": IsoC(),
}
"""The methods that are compared by default, by their labels."""


def analyze(
    base: Source,
    models: Sequence[Source],
    *,
    methods: Mapping[str, Method] | Sequence[str] = METHODS,
    select: Sequence[Any] = (),
    rename: Sequence[Any] = (),
    out: str | Path | None = None,
    png: str | Path | None = None,
    force: bool = False,
    progress: bool = False,
) -> Analysis:
    """Measure the task vectors of K models of one base, and what merging methods make of them.

    One tensor is in memory at a time: its K task vectors and the M merged ones in float32 (float64 where it is stored
    so), with room for their spectra, and what the methods need. docs/analysis.md has the formulas.

    Args:
        base, models: as for :func:`freemerge.merge`. Inputs are not modified.
        methods: what is compared, each at the scale of a recipe's "auto": label -> method, for instance
            ``{"Iso-C": fm.methods.IsoC()}``, or names of methods.
        select: rules as in a :class:`freemerge.Recipe`; what they copy is left out.
        rename: prefixes as in a recipe.
        out: a file for the report; ``force`` allows to replace one.
        png: a folder for the figures of the report as PNG files, which is made. It needs matplotlib; ``force`` allows
            one that exists.
        progress: show a progress bar on standard error.

    Raises:
        ArgumentError, CheckpointError: as :func:`freemerge.merge`, and if there is nothing to analyse, or no
            matplotlib for ``png``, and if ``out`` or ``png`` cannot be written.
        RefusedError: ``out`` or ``png`` exists and may not be replaced.
    """
    methods = _methods(methods)
    # Of all methods, the task vectors are those of one that has to know which way layers are stored, if there is one.
    asking = next((method for method in methods.values() if method.by_inputs), "fr")
    recipe = Recipe(method=asking, select=select, rename=rename)
    if out is not None:
        check_file(path_of("out", out), "a report", force=force, inputs=(base, *models))
    if png is not None:
        _check_folder(path_of("png", png), force=force)
        refuse_paths(png, (base, *models))
        check_matplotlib()
    with ExitStack() as stack:
        merger = open_merger(stack, base, models, recipe)
        units = [unit for unit in merger.units if unit.by_method and merger.specs[unit.names[0]].numel]
        if not units:
            raise ArgumentError("there is nothing to analyse: all tensors are copied, averaged or empty")
        sources = (merger.base, *merger.models)
        sizes = {unit: sum(source.specs[unit.names[0]].nbytes for source in sources) for unit in units}
        total = sum(sizes.values())
        measuring = total * sum(method.passes for method in methods.values())
        bar = stack.enter_context(Progress(measuring, total, ratio=SLOWNESS, style="bar" if progress else "none"))
        measured = {label: _measured(merger, method, bar) for label, method in methods.items()}
        found = {}
        for unit in merger.ahead(units):
            found[unit.names[0]] = _sums(merger.vectors(unit), methods, measured)
            bar.advance("merge", sizes[unit], 1)
        analysis = _analysis(merger, found, methods, measured)
    if out is not None:
        _write(analysis.to_html(), Path(out), force=force)
    if png is not None:
        _check_folder(Path(png), force=force)
        Path(png).mkdir(exist_ok=True)
        for name, content in pictures(analysis):
            _write(content, Path(png) / name, force=force)
    return analysis


def _methods(methods: object) -> dict[str, Method]:
    if isinstance(methods, Mapping):
        if all(isinstance(label, str) and isinstance(method, Method) for label, method in methods.items()):
            return dict(methods)
    elif isinstance(methods, Sequence) and not isinstance(methods, str):
        try:
            named = [Recipe(method=name).method for name in methods]  # which knows what to say about a misspelt name
        except ArgumentError as error:
            raise ArgumentError(f"methods: {error}") from None
        return {method.title: method for method in named}
    raise ArgumentError(f"methods must be a list of names, or map labels to methods, got {methods!r}")


def _check_folder(folder: Path, *, force: bool) -> None:
    """Complain about a place for pictures before the work begins."""
    if not folder.parent.is_dir():
        raise CheckpointError(f"png: {folder} is in no directory that exists")
    if folder.exists() and not folder.is_dir():
        raise RefusedError(f"png: {folder} is no directory")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise RefusedError(f"{folder} is not empty; use --force (force=True) to replace files in it")


def _write(content: str | bytes, out: Path, *, force: bool) -> None:
    check_file(out, "a report", force=force, inputs=())
    write_file(out, content)


def _measured(merger: Merger, method: Method, bar: Progress) -> Measured:
    """What a method needs to know about the whole model."""
    # The projection scale follows from the sums that are taken anyway; to measure it would double the work.
    scale = 1.0 if isinstance(method, SpectralMethod) else "auto"
    recipe = merger.recipe.replace(method=method, scale=scale)
    return Merger(merger.inputs, recipe).measure(lambda unit, size: bar.advance("measure", size, 0))


def _sums(vectors: TaskVectors, methods: Mapping[str, Method], measured: Mapping[str, Measured]) -> Sums:
    """The sums of one unit, which is one tensor, as there are no views. It is read once."""
    (tensor,) = vectors.tensors
    base = tensor.base()
    found = list(tensor.each())
    tasks = len(found)
    found += _merged(vectors, found, methods, measured)
    entries = entry_sums(base, found, tasks)
    if not vectors.as_matrices:
        return dataclasses.replace(Sums.zeros(tasks, len(methods)), entries=entries)
    singular = singular_sums(found, tasks)
    return Sums(entries, band_sums(found, tasks, [method.response for method in methods.values()]), singular)


def _merged(
    vectors: TaskVectors, found: Sequence[Tensor], methods: Mapping[str, Method], measured: Mapping[str, Measured]
) -> list[Tensor]:
    """What each method merges, from the task vectors in memory: those of models of a base of zeros."""
    (tensor,) = vectors.tensors
    zero = torch.zeros_like(found[0])
    held = dataclasses.replace(tensor, base=lambda: zero, models=[delta.detach for delta in found])
    return [
        method.merge(
            dataclasses.replace(vectors, tensors=(held,), as_matrices=vectors.as_matrices and method.sees_matrices),
            measured[label],
        )
        .complete()
        .tensors[0]
        for label, method in methods.items()
    ]


def _analysis(
    merger: Merger, found: Mapping[str, Sums], methods: Mapping[str, Method], measured: Mapping[str, Measured]
) -> Analysis:
    count = len(merger.models)
    tasks = _short([model.name for model in merger.models])
    total = _total(found.values())
    scales = {}
    for v, (label, method) in enumerate(methods.items(), start=count):
        gram = total.entries.gram
        if isinstance(method, SpectralMethod):
            scales[label] = method.regained * projection_scale(np.diagonal(gram)[:count], gram[v, :count])
        else:
            scales[label] = measured[label].scale
    filters = {label: method.response is not None for label, method in methods.items()}

    def grouped(key: Callable[[str], T]) -> dict[T, Measures]:
        groups: dict[T, list[Sums]] = {}
        for name, sums in found.items():
            groups.setdefault(key(name), []).append(sums)
        return {group: measures_of(_total(members), scales, filters) for group, members in groups.items()}

    whole = measures_of(total, scales, filters)
    return Analysis(
        _short([merger.base.name])[0],
        tasks,
        EDGES,
        RANKS,
        scales,
        whole,
        grouped(module_type),
        {layer: of_layer for layer, of_layer in grouped(depth).items() if layer is not None},
        tuple(
            TensorMeasures(
                name, merger.specs[name].shape, module_type(name), depth(name), measures_of(sums, scales, filters)
            )
            for name, sums in found.items()
        ),
        tuple(name for name in merger.specs if name not in found),
        merger.notices,
        advise(whole, tasks, {m.name: scales[label] for label, m in methods.items() if m == type(m)()}),
    )


def _total(sums: Iterable[Sums]) -> Sums:
    return reduce(add, sums)


def _short(names: Sequence[str]) -> tuple[str, ...]:
    """Names without folders and endings where that keeps them apart; otherwise whole, with numbers if need be."""
    short = tuple(name.rsplit("/", 1)[-1].removesuffix(".safetensors") for name in names)
    if len(set(short)) == len(short):
        return short
    return tuple(f"{name} {i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names))
