"""The merge of one unit at a time: base and K models in, merged tensors out, by any method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from io import RawIOBase

import torch
from torch import Tensor

from ..accumulate import abs_means, add_round
from ..backends.registry import named
from ..checkpoint import DEFAULT_MEMORY, MERGEABLE, Checkpoint, Inputs, TensorSpec
from ..checkpoint.compare import compare, mixed_dtype_notices
from ..checkpoint.finite import all_finite, check_finite, stays_finite
from ..checkpoint.mapped import fetched
from ..checkpoint.tied import second_everywhere
from ..errors import ArgumentError, CheckpointError
from ..lazy import cached_property
from ..methods import Measured, Merged
from ..methods.vectors import Deltas, TaskVectors
from ..methods.whole import Result, Whole
from ..workers import ALONE, Workers
from .accounting import PROCESS_BYTES, Accounting
from .inspection import Decision, Inspection, decide, warnings
from .kept import Kept
from .pinned import PinnedCopies, read
from .recipe import Recipe
from .selection import drops, left_alone, rule_of
from .stages import Stopwatch
from .statistics_buffers import check_variance, convex
from .unchanged import gives_back
from .units import Unit, plan_units, require_equal, together, without_matrices

_CPU = torch.device("cpu")
OnRead = Callable[[Unit, int], None]  # called with a unit and the bytes just read of it


@dataclass(frozen=True)
class MergedUnit:
    """The merged tensors of a unit, under every name that is written, and what the method noted about them.

    ``flat``: those of a flat unit, end to end; ``tensors`` then holds second names only.
    """

    tensors: dict[str, Tensor]
    notes: dict[str, dict[str, object]]
    flat: Tensor | None = None


class Merger:
    """A base, K models and a recipe, checked to fit together.

    :meth:`measure` finds out what the method needs to know about the whole model, :meth:`merged` merges one unit. Units
    are independent of each other.

    Attributes:
        units: what is merged together, in the order of the tensors' names.
        steps: the same with small tensors put together, in the order of an output file.
        tied: second name -> first name of the base's tensors that are one tensor of the model; they follow the first.
        written: the names that an output file holds: second names only where the base's files hold a copy of their own.
        notices: what is worth knowing about the inputs, in sentences.
        bytes: what is read, worked on and written.
        inputs: the base and its models, ``base`` and ``models``, and how they were opened.
        scale: the global scale; None if :meth:`measure` has to find it.
        stopwatch: where the time went.
        kept: what :meth:`measure` merges to find the scale, and what others put there, for :meth:`merged`, if
            :meth:`keep_in` was told where.
        memory: bytes that are fetched from the disk before they are needed; those of the next unit always are.

    Args:
        of_models: whether models are merged; differences of them may hold negative variances.
    """

    def __init__(
        self,
        inputs: Inputs,
        recipe: Recipe,
        backend: str = "auto",
        memory: int = DEFAULT_MEMORY,
        *,
        of_models: bool = True,
    ) -> None:
        self._chosen = named(backend)
        if self._chosen is not None:
            self._chosen.require()
        self.inputs, self.recipe, self.backend = inputs, recipe, backend
        self.base, self.models = base, models = inputs.base, tuple(inputs.models)
        self.method, self.memory = recipe.merging, memory
        if len(models) < recipe.method.fewest:
            raise ArgumentError(f"method {recipe.method.name} takes at least {recipe.method.fewest} models")
        self.stopwatch = Stopwatch()
        self.kept: Kept | None = None
        self._of_models = of_models
        self._pinned = PinnedCopies()

        def names(name: str) -> tuple[str, ...]:
            first = base.tied.get(name, name)
            return (first, *base.aliases(first))

        comparison = compare(
            base,
            models,
            merged=lambda name: not left_alone(names(name), recipe.select),
            heeded=lambda name: not left_alone((name, *base.aliases(name)), recipe.select),
        )
        dropped = {name for name in base.specs if drops(names(name), recipe.select)}
        dropped |= {name for name, first in comparison.tied.items() if first in dropped}
        ties = {name: first for name, first in (base.tied | comparison.tied).items() if name in base.specs}
        self.tied = {name: first for name, first in ties.items() if name not in dropped}
        self.written = [name for name in base.specs if name not in base.tied and name not in dropped]
        self.specs = {name: spec for name, spec in base.specs.items() if name not in ties}
        units = plan_units(
            self.specs,
            recipe.select,
            recipe.views,
            others=dict.fromkeys(name for model in models for name in model.specs if name not in self.specs),
            second=second_everywhere((base, *models)),
            aliases=base.aliases,
            buffers=base.buffers,
        )
        self.units = units if self.method.sees_matrices else list(without_matrices(units))
        self.bytes = Accounting(base, models, recipe, self.specs, self.out_spec)
        self._layers = {name: layer for name in self.specs if (layer := rule_of(names(name), recipe.layers))}
        self._check_layers()
        self._transposed = self._find_transposed()
        self.steps = self._steps()
        self._seconds: dict[str, list[str]] = {}
        for second in set(self.tied) & set(self.written):
            self._seconds.setdefault(self.tied[second], []).append(second)
        self.scale = self.bytes.scale
        alone = ["one model: the result is that model"] if gives_back(recipe, len(models)) else []
        self.notices = (*inputs.notices, *mixed_dtype_notices(comparison, models), *alone)

    def _check_layers(self) -> None:
        """Every pattern must match a tensor, and tensors that are merged together have one weight a model."""
        for layer in self.recipe.layers:
            if not any(rule_of((name, *self.base.aliases(name)), [layer]) for name in self.specs):
                raise ArgumentError(f"layers: pattern {layer.pattern!r} matches no tensor of the base")
        for unit in self.units if self._layers else ():
            if len({self._layers.get(name) for name in unit.names}) > 1:
                raise ArgumentError(f"layers: {unit.names[0]} is stacked with tensors that have other weights")

    def _find_transposed(self) -> set[str]:
        """The weights stored as [inputs, outputs], where the architecture is known and it makes a difference."""
        by_inputs = self.method.by_inputs or self.recipe.scale == "interference"
        known = self.base.architecture if by_inputs else None  # may import transformers
        if known is None:
            return set()
        matrices = {name: spec.shape for name, spec in self.specs.items() if len(spec.shape) > 1}
        found = {name for name, shape in matrices.items() if known.transposed(name, shape)}
        for unit in self.units:
            if len({name in found for name in unit.names}) > 1:
                raise ArgumentError(
                    f"views: {unit.names[0]} is stacked with weights whose inputs and outputs are stored the other way"
                )
        return found

    def out_spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a merged tensor."""
        spec = self.base.specs[name]
        wanted = self.recipe.out_dtype
        return spec.with_dtype(getattr(torch, wanted)) if wanted is not None and spec.dtype in MERGEABLE else spec

    def inspect(self, notices: Iterable[str] = ()) -> Inspection:
        """Say what will happen, without reading any data; ``notices``: what else is worth knowing."""
        decisions: list[Decision] = []
        for unit in self.units:
            dtype = self.bytes.compute_dtype(unit.names[0])
            device = self._device(unit.names[0])
            decisions += decide(unit, self.specs, self.method.response, dtype, device, self.backend)
        passes = 1 + self.method.passes + (self.scale is None)
        written = sum(self.out_spec(name).nbytes for name in self.written)
        notices = (*self.notices, *notices, *warnings(decisions))
        measured, merged = self.bytes.reads(self.units)
        return Inspection(tuple(decisions), notices, measured + merged, written, passes, measured, self._memory_bytes())

    def measure(
        self,
        on_read: OnRead | None = None,
        workers: Workers = ALONE,
        worker: Callable[[Unit], int] = lambda unit: 0,
    ) -> Measured:
        """What the method finds out about the whole model, the weights above all, and the scale.

        It sees what it merges alone: running statistics, which may be far apart, do not weigh on weights.
        ``worker``: which one of the workers measures a unit; all of them get the same, which is what one would find.
        """
        units = [unit for unit in self.steps if unit.by_method]
        own = [i for i, unit in enumerate(units) if worker(unit) == workers.rank]

        def vectors(
            read_bytes: Callable[[Unit], int], chosen: Sequence[Unit], *, merges: bool = False
        ) -> Iterator[TaskVectors]:
            for unit in self.ahead(chosen):
                with self.stopwatch.stage("merge", self.bytes.worked(unit)) if merges else nullcontext():
                    yield self.vectors(unit)
                if on_read is not None:
                    on_read(unit, read_bytes(unit))

        measured = self.method.measure(
            _Shared(partial(vectors, self.bytes.look), units, own, workers), len(self.models)
        )
        scale = self.scale
        if scale is None:
            interference = self.recipe.scale == "interference"
            if interference:  # between matrices, small ones too
                units = [unit for unit in self.units if unit.by_method and self.bytes.has_matrices(unit)]
                own = [i for i, unit in enumerate(units) if worker(unit) == workers.rank]
            whole = _Shared(partial(vectors, self.bytes.find_scale, merges=True), units, own, workers)
            method = self.method
            if interference:
                scale = method.interference_scale(whole, measured, len(self.models))
            else:
                scale = method.measure_scale(whole, self._keep)
        return dataclasses.replace(measured, scale=scale)

    def keep_in(self, file: RawIOBase) -> Kept:
        """Where :meth:`measure` keeps what it merges to find the scale, of up to :meth:`Accounting.keepable`."""
        self.kept = Kept(file)
        return self.kept

    def _keep(self, vectors: TaskVectors, merged: Merged) -> None:
        """Keep matrices, which take time to merge, for :meth:`merged`."""
        if self.kept is not None and vectors.as_matrices:
            self.kept.put([tensor.name for tensor in vectors.tensors], merged)

    def outputs(self, unit: Unit) -> list[str]:
        """The names under which :meth:`merged` gives the tensors of a unit."""
        return [*unit.names, *(second for name in unit.names for second in self._seconds.get(name, ()))]

    def merged(
        self,
        unit: Unit,
        measured: Measured,
        on_read: OnRead | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> MergedUnit:
        """The merged tensors of a unit, new ones in their output dtype, with the second names of :attr:`written`.

        ``settle``: called before memory is taken for them.
        """
        flat: Tensor | None = None
        if unit.action == "copy":
            tensors = {name: self._copied(name, must_agree=unit.must_agree) for name in unit.names}
            notes: dict[str, dict[str, object]] = {}
        elif unit.action == "average":
            tensors, notes = self._averaged(unit, self._with_layer(unit, measured)), {}
        elif unit.flat:
            flat, notes = self._merged_flat(unit, measured), {}
            tensors = self._parts(unit, flat) if self._seconds.keys() & set(unit.names) else {}
        else:
            merged = self.task_vectors(unit, measured)
            settle()
            with self.stopwatch.stage("round", self.bytes.worked(unit)):
                tensors = dict(self._added(unit, merged, measured.scale))
            notes = dict(zip(unit.names, merged.notes, strict=True)) if merged.notes else {}
        for name in self._seconds.keys() & tensors.keys():
            tensors |= dict.fromkeys(self._seconds[name], tensors[name])
        if flat is not None:
            tensors = {name: tensor for name, tensor in tensors.items() if name in self.tied}
        if on_read is not None:
            on_read(unit, self.bytes.merge(unit))
        return MergedUnit(tensors, notes, flat)

    def task_vectors(self, unit: Unit, measured: Measured) -> Merged:
        """The merged task vectors of a unit that is the method's to merge; those :attr:`kept`, if they are."""
        merged = self.kept.take(unit.names) if self.kept is not None else None
        if merged is None:
            with self.stopwatch.stage("merge", self.bytes.worked(unit)):
                merged = self.method.merge(self.vectors(unit), self._with_layer(unit, measured))
        return merged

    def _with_layer(self, unit: Unit, measured: Measured) -> Measured:
        """With the weights of the unit's layer, if it has any."""
        layer = self._layers.get(unit.names[0])
        return measured if layer is None else dataclasses.replace(measured, weights=layer.weights)

    def _added(self, unit: Unit, merged: Merged, scale: float) -> Iterator[tuple[str, Tensor]]:
        """``theta_0 + scale * merged`` of each member, rounded to its output dtype."""
        for name, delta in zip(unit.names, merged.addends, strict=True):
            spec = self.out_spec(name)
            base = self._pinned.read(self.base, name).to(delta.device)
            # Finite inputs can still leave the range of float16, or of anything at a large scale.
            check = partial(check_finite, name, source=f"merged model at scale {scale:g} in {spec.dtype_name}")
            tensor = add_round(base, delta, scale, spec.dtype, factor=merged.factor, check=check)
            yield name, tensor.to(self.base.device(name))

    def _merged_flat(self, unit: Unit, measured: Measured) -> Tensor:
        """Small tensors merged as one vector."""
        (delta,) = self.task_vectors(unit, measured).complete().tensors
        spec = self.out_spec(unit.names[0])

        def check(merged: Tensor) -> None:
            for name, part in () if all_finite(merged) else self._parts(unit, merged).items():
                check_finite(name, part, f"merged model at scale {measured.scale:g} in {spec.dtype_name}")

        return add_round(_read_flat(self.base, unit.names), delta, measured.scale, spec.dtype, check=check)

    def _parts(self, unit: Unit, flat: Tensor) -> dict[str, Tensor]:
        """The tensors of a flat unit."""
        specs = [self.specs[name] for name in unit.names]
        parts = torch.split(flat, [spec.numel for spec in specs])
        return {spec.name: part.view(spec.shape) for spec, part in zip(specs, parts, strict=True)}

    def _averaged(self, unit: Unit, measured: Measured) -> dict[str, Tensor]:
        """Running statistics of a unit: an average of base and models, whatever the method and its scale."""
        count = len(self.models)
        weights, scale = convex(measured.weights or [1 / count] * count, measured.scale)
        tensors = {}
        for vectors in self.vectors(unit).tensors:
            delta = vectors.sum(weights)
            name, spec = vectors.name, self.out_spec(vectors.name)
            check = partial(check_finite, name, source=f"merged model in {spec.dtype_name}")
            base = self._pinned.read(self.base, name).to(delta.device)
            tensor = add_round(base, delta, scale, spec.dtype, check=check)
            if self._of_models:
                sources = ((source.label, source.read(name)) for source in (self.base, *self.models))
                check_variance(name, tensor, sources)
            tensors[name] = tensor.to(self.base.device(name))
        return tensors

    def _copied(self, name: str, *, must_agree: bool) -> Tensor:
        base = read(self.base, name)
        if must_agree:
            for model in self.models:
                require_equal(name, base, read(model, name).to(base.device), model.label)
        spec = self.out_spec(name)
        copied = base.to(spec.dtype, copy=True, memory_format=torch.contiguous_format)
        if copied.dtype != base.dtype and not stays_finite(base, copied):
            raise CheckpointError(f"{self.base.origin(name)}: tensor {name!r} does not fit into {spec.dtype_name}")
        return copied

    def ahead(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """The units; meanwhile the next one and more, of up to :attr:`memory` bytes, are fetched from the disk, and
        copied to pinned memory if they are merged on a GPU."""
        with (
            ThreadPoolExecutor(1, thread_name_prefix="freemerge-read") as pool,
            self._pinned.threads() if self._on_gpu else nullcontext(),
        ):
            sizes = list(map(self.bytes.look, units))
            fetched = held = 0  # held: bytes of the unit at work and of those that are fetched
            for i, unit in enumerate(units):
                while fetched < len(units) and (fetched <= i + 1 or held - sizes[i] + sizes[fetched] <= self.memory):
                    for source in self._sources(units[fetched]):
                        if self._goes_to_gpu(units[fetched], source):
                            self._pinned.put(source, units[fetched].names)
                    pool.submit(self._will_need, units[fetched])
                    held += sizes[fetched]
                    fetched += 1
                yield unit
                held -= sizes[i]
                if self._on_gpu:
                    self._pinned.drop(unit.names)

    @cached_property
    def _on_gpu(self) -> bool:
        return any(self._device(name) != _CPU for name in self.specs)

    def _goes_to_gpu(self, unit: Unit, source: Checkpoint) -> bool:
        """Whether a unit goes to a GPU from a file, which any thread may read."""
        if not self._on_gpu or unit.action == "copy" or not (source.files and self.base.files):
            return False
        name = unit.names[0]
        return source.device(name) == _CPU != self._device(name)

    def _will_need(self, unit: Unit) -> None:
        if not unit.flat:  # small tensors come with what the system reads ahead anyway
            for source in self._sources(unit):
                source.will_need(unit.names)

    def _memory_bytes(self) -> int:
        """What the merge takes at most, with what is read ahead or waits to be written."""
        taken = self.bytes.memory(self.steps, self._transposed)
        pinned = [unit for unit in self.steps if any(self._goes_to_gpu(unit, source) for source in self._sources(unit))]
        if pinned:  # the one at work, and those ahead; torch rounds up to powers of two
            taken += 2 * (2 * max(map(self.bytes.look, pinned)) + self.memory)
        return taken + self.memory + PROCESS_BYTES

    def _sources(self, unit: Unit) -> tuple[Checkpoint, ...]:
        """The checkpoints from which a unit is read."""
        known = self.kept is not None and unit.names in self.kept
        return (self.base,) if unit.base_alone or known else (self.base, *self.models)

    # Reading

    def _steps(self) -> list[Unit]:
        """Wider dtypes come first, as in the files that are written, so that these are written from front to back."""
        ordered = sorted(self.units, key=lambda unit: -self.out_spec(unit.names[0]).dtype.itemsize)
        if not self.method.by_entries:
            return ordered

        def kind(name: str) -> tuple[object, ...]:
            return self.bytes.dtypes[name], self._layers.get(name), *[source.device(name) for source in in_memory]

        # Files are read on the CPU, and adapters where the base is.
        in_memory = [source for source in (self.base, *self.models) if not source.files]
        return ordered if self._on_gpu else list(together(ordered, self.specs, kind))

    def _flat(self, unit: Unit) -> TaskVectors:
        """The task vectors of a flat unit as one."""
        names = unit.names

        def base() -> Tensor:
            flat = _read_flat(self.base, names)
            return flat.double() if self.bytes.compute_dtype(names[0]) == torch.float64 else flat

        sizes = tuple([self.specs[name].numel for name in names])
        models = [partial(self._timed, _read_flat, model, names) for model in self.models]
        flat = Deltas(names[0], (sum(sizes),), partial(self._timed, base), models, partial(self._check, names))
        return TaskVectors((flat,), False, backend=self.backend, sizes=sizes)

    def _timed(self, read: Callable[..., Tensor], *what: object) -> Tensor:
        """Mapped memory is read while it is worked on, which ends with :meth:`_check`."""
        self.stopwatch.reads()
        return read(*what)

    def vectors(self, unit: Unit) -> TaskVectors:
        """The task vectors of a unit, which are read when they are asked for."""
        if unit.flat:
            return self._flat(unit)
        deltas = tuple(
            Deltas(
                name,
                self.specs[name].shape,
                partial(self._timed, self._read_base, name),
                [partial(self._timed, self._pinned.read, model, name) for model in self.models],
                partial(self._check, (name,)),
                transposed=name in self._transposed,
            )
            for name in unit.names
        )
        return TaskVectors(deltas, unit.action == "filter", unit.parts, self.backend)

    def _read_base(self, name: str) -> Tensor:
        base = self._pinned.read(self.base, name).to(self._device(name))
        wide = self.bytes.compute_dtype(name) == torch.float64
        return base.double() if wide else base  # arithmetic follows the widest

    def _device(self, name: str) -> torch.device:
        """Where a tensor is merged: where the base holds it, unless the backend asked for needs another device."""
        device = self.base.device(name)
        return device if self._chosen is None else self._chosen.device(device)

    def _check(self, names: Sequence[str], means: Sequence[float]) -> None:
        """Raise CheckpointError, naming tensor and source, if a mean |theta_i - theta_0| of theirs is not finite."""
        some = self.models[: len(means)] if len(means) < len(self.models) else ()  # or all, and the base
        nbytes = [source.specs[name].nbytes for source in some for name in names]
        self.stopwatch.has_read(sum(nbytes or map(self.bytes.nbytes.__getitem__, names)))
        if all(map(math.isfinite, means)):
            return
        for name in names:
            for source in (self.base, *self.models):
                check_finite(name, source.read(name), source.origin(name))
        for name in names:
            base = self._read_base(name)
            if not all(map(math.isfinite, abs_means(base, [read(m, name).to(base.device) for m in self.models]))):
                raise CheckpointError(f"tensor {name!r}: the difference of a model and the base overflows")
        raise CheckpointError(f"tensors {names[0]!r} to {names[-1]!r}: what they add up to overflows")


def _read_flat(source: Checkpoint, names: Sequence[str]) -> Tensor:
    return fetched(source.read_flat(names), source, names[0])


class _Shared(Whole[TaskVectors]):
    """The task vectors of some units, each of which one of the workers looks at: this one at ``own``."""

    def __init__(
        self,
        vectors: Callable[[Sequence[Unit]], Iterator[TaskVectors]],
        units: Sequence[Unit],
        own: Sequence[int],
        workers: Workers,
    ) -> None:
        super().__init__(partial(vectors, units))
        self._count, self._own, self._workers = len(units), own, workers
        self._mine = Whole(partial(vectors, [units[i] for i in own]))

    def map(self, function: Callable[[TaskVectors], Result]) -> list[Result]:
        results: dict[int, Result] = {}
        for part in self._workers.gather(dict(zip(self._own, self._mine.map(function), strict=True))):
            results |= part
        return [results[i] for i in range(self._count)]

    def total(self, add: Callable[[TaskVectors, Tensor], None], zeros: Tensor) -> Tensor:
        return self._workers.total(self._mine.total(add, zeros))
