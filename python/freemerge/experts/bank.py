"""Experts attached to a model: switched on and off in place, bit for bit, or added in the forward pass."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..arguments import function, number, path_of
from ..backends.sparse import Scratch, SparseVector, Update
from ..checkpoint import MERGEABLE, Checkpoint, Source
from ..checkpoint.prefixes import Naming
from ..checkpoint.quantised import dequantised
from ..checkpoint.views import InModuleLayout, renamed
from ..dense import dense
from ..errors import ArgumentError, CheckpointError
from ..merging.statistics_buffers import convex
from ..overlap import internal_overlap, overlapping_pair
from .contributions import Product
from .deltas import Change, Layout, forward_deltas, unserved
from .expert import Expert
from .placement import Part, Placement, gathered, gathered_dense, seen_by
from .switch import Switch, add_dense, weighted_sum
from .turns import Weights, turn
from .values import ExpertTensor, LowRankTensor, SparseTensor
from .values.base import Seen

Combine = Literal["add", "replace"]


class ExpertBank(Mapping[str, Expert]):
    """The experts of a merged model by task name, ready to be switched on.

    Args:
        model: the merged backbone: a module, or a state dict of float tensors. Its tensors are changed in place, on
            whatever device they are, while an expert is active, and are bit for bit as before afterwards.
        experts: as :func:`extract_experts` returns them. Their names may be those of the model's files, where
            transformers loads separate tensors into stacked ones, or lack what wrappers such as torch.compile add.
        base: theta_0 (state dict, module or path), which ``combine="replace"`` needs, and experts that are masks or
            gains. For gains, the singular vectors of theta_m - theta_0 are found here, and kept in float32: do not load
            other weights into the model afterwards.
        backbone: theta_m (as base), for gains where the model holds it rounded, as in bfloat16.

    Raises ArgumentError or CheckpointError, naming the tensor, if an expert does not fit the model or the base. It is
    safe to use the banks of one model from several threads: they share the weights, so a thread that switches waits
    until no other has an expert on. Tasks of an event loop must not wait there, and get an ArgumentError; let them take
    turns, as by an asyncio.Lock. Do not run the model outside of :meth:`active` while another thread is inside, nor
    move, convert or copy it inside: the copy would keep the expert. A copy of a bank, by copy.deepcopy or pickle, has a
    copy of the model.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        experts: Mapping[str, Expert],
        *,
        base: Source | None = None,
        backbone: Source | None = None,
    ) -> None:
        if not isinstance(model, nn.Module | Mapping):
            raise ArgumentError(f"model must be a module or a state dict, got {type(model).__name__}")
        self._model, self._shared = model, Weights(model)
        self._placement = Placement(model)
        self._sources = base, backbone
        self._base = None if base is None else self._opened(base, "base")
        self._backbone = None if backbone is None else self._opened(backbone, "backbone")
        self._scratch = Scratch()
        self._attach(_checked(experts), {})

    def _attach(self, experts: dict[str, Expert], seen: dict[str, Seen]) -> None:
        """Find where they belong. ``seen``: what another bank has kept of the merged task vectors."""
        self._experts, self._seen = experts, seen
        self._shapes: dict[str, torch.Size] = {}  # of the tensors that experts change
        self._parts = {task: self._placed(task, expert.tensors) for task, expert in experts.items()}
        self._statistics = {task: self._placed_statistics(task, expert) for task, expert in experts.items()}
        self._entries = {
            task: {name: tensor for name, tensor in expert.tensors.items() if isinstance(tensor, SparseTensor)}
            for task, expert in experts.items()
        }
        self._vectors: dict[tuple[str, str], SparseVector] = {}
        self._origins: dict[tuple[str, str], Tensor] = {}
        self._switches: dict[tuple[str, Combine], tuple[float, Switch]] = {}
        for task, expert in experts.items():
            self._check(task, expert)
        for task, expert in experts.items():
            self._keep(task, expert)

    @staticmethod
    def load(
        model: nn.Module | Mapping[str, Tensor],
        folder: str | os.PathLike[str],
        *,
        base: Source | None = None,
        backbone: Source | None = None,
    ) -> ExpertBank:
        """Attach every expert file of a folder; the task is the file's name without ``.safetensors``."""
        files = sorted(path_of("folder", folder).glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} holds no expert files (*.safetensors)")
        return ExpertBank(model, {file.stem: Expert.load(file) for file in files}, base=base, backbone=backbone)

    def __reduce__(self) -> tuple[Callable[..., ExpertBank], tuple[object, ...], tuple[object, ...]]:
        """A copy is attached anew: to the copy of the model, as :func:`copy.deepcopy` and :mod:`pickle` make one."""
        base, backbone = self._sources
        return partial(ExpertBank, base=base, backbone=backbone), (self._model, {}), (self._experts, self._seen)

    def __setstate__(self, state: tuple[dict[str, Expert], dict[str, Seen]]) -> None:
        self._attach(*state)  # what was kept was found before the model was rounded, if it has been

    def __getitem__(self, task: str) -> Expert:
        return self._experts[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)

    @contextmanager
    def active(self, experts: str | Mapping[str, float], *, combine: Combine = "add") -> Iterator[None]:
        """Within the ``with`` block, the model has these experts on: one by name, or several by weight.

        ``"add"``: theta_m + sum_i w_i e_i (the paper). ``"replace"``: where an expert has an entry,
        theta_0 + sum_i w_i e_i instead (the released code); for experts of single entries only. A weight of 0 is
        off. Blocks may be nested, the inner ones left first (ArgumentError otherwise, as with generators that take
        turns); they act on what outer ones left. Blocks nest in one context (:mod:`contextvars`): that of a thread, of
        an asyncio task, or of the request for which a server's pool of threads works. Weights are restored even after
        an exception, and by any thread that leaves the block.

        The cost of single entries is that of the entries touched, not of the model. Low-rank experts touch every entry:
        their products are added tensor by tensor, and the former weights kept as copies. In a mixture of both kinds,
        entries are added last.

        With activation checkpointing, run the backward pass inside of the block, too: it repeats the forward pass.

        Running means and variances become ``(1 - sum_i a_i) s_m + sum_i a_i s_i``, a_i = w_i :attr:`Expert.share`; it
        is an average always: negative a_i count as 0, and a sum above 1 is brought down to 1.
        """
        weights = self._weights(experts)
        if combine not in ("add", "replace"):
            raise ArgumentError(f"combine must be 'add' or 'replace', got {combine!r}")
        if combine == "replace" and self._base is None:
            raise ArgumentError("combine='replace' needs the base: give it to ExpertBank")
        averages = self._averages(weights)
        whole = {task: weight for task, weight in weights.items() if not self._sparse(task)}
        sparse = {task: weight for task, weight in weights.items() if task not in whole}
        if combine == "replace" and whole:
            raise ArgumentError(f"combine='replace' is for experts of single entries; {next(iter(whole))!r} has none")
        with turn(self._shared) as undo:
            if weights:
                undo.callback(torch.clear_autocast_cache)  # it keeps copies of weights
            for name in self._touched(whole):  # before entries, as masks are of the merged weights alone
                undo.enter_context(add_dense(self._tensor(name), self._dense_terms(name, whole)))
            if sparse:
                tensors = {name: self._tensor(name) for name in self._touched(sparse)}
                undo.enter_context(self._switch(sparse, combine, tensors).on([*tensors.values()]))
            for name, terms in averages.items():
                undo.enter_context(add_dense(self._tensor(name), self._moves(name, terms)))
            if weights:
                torch.clear_autocast_cache()
            yield

    @contextmanager
    def deltas(self, experts: Sequence[str | Mapping[str, float] | None]) -> Iterator[None]:
        """Within the block, sample j of a batch is computed with ``experts[j]``; the weights stay as they are.

        Every module with touched parameters adds the sparse products ``w_i (e_i x)`` to its output, for the samples
        concerned, so one forward pass serves a batch of mixed experts; results agree with :meth:`active` to rounding.
        The model must be a module, and the batch the first dimension of what every such module gets. Linear, Embedding,
        convolutions, LayerNorm, GroupNorm and batch norms in eval mode can do it. A model that passes a parameter to a
        function, instead of calling the module that holds it, gets wrong results; :meth:`serves_deltas` tells. A graph
        that torch.compile has made around the model leaves the products out. With activation checkpointing, run the
        backward pass inside of the block, too: it repeats the forward pass. Raises ArgumentError for what the modules
        themselves cannot serve, compiled ones among them, before anything is computed, and for an input whose first
        dimension is neither ``len(experts)`` nor 1. Such blocks nest, but for experts with running statistics of one
        batch norm (ArgumentError); :meth:`active` inside of the block leaves these as they are for the samples.
        """
        if isinstance(experts, str | Mapping) or not isinstance(experts, Sequence):
            raise ArgumentError(f"experts must be a list, what each sample of the batch gets, got {experts!r}")
        samples = [{} if chosen is None else self._weights(chosen) for chosen in experts]
        tasks = [task for task in self._experts if any(task in weights for weights in samples)]
        layout = self._layout_for_deltas(tasks)
        if isinstance(layout, str):
            raise ArgumentError(layout)
        shares = [[chosen.get(task, 0.0) for task in tasks] for chosen in samples]
        weights = torch.tensor(shares, dtype=torch.float64, device="cpu").view(len(samples), len(tasks))
        with turn(self._shared) as undo:
            updates = [{name: self._change(task, name) for name in self._parts[task]} for task in tasks]
            statistics = self._of_samples(samples)
            undo.enter_context(forward_deltas(layout, weights, updates, statistics))
            yield

    def serves_deltas(self, tasks: Iterable[str] | None = None, run: Callable[[], object] | None = None) -> str | None:
        """Why :meth:`deltas` cannot serve the experts of ``tasks``, by default all; None if it can.

        ``run``, if given, must run the model on a batch of one sample. It is called without gradients, and shows what
        the modules alone do not tell: whether each is called, with the batch as the first dimension, and whether its
        parameters are used elsewhere.
        """
        if isinstance(tasks, str) or not isinstance(tasks, Iterable | None):
            raise ArgumentError(f"tasks must be a list of names, got {tasks!r}")
        if run is not None:
            function("run", run)
        found = self._layout_for_deltas(self if tasks is None else tasks, run)
        return found if isinstance(found, str) else None

    def _layout_for_deltas(self, tasks: Iterable[str], run: Callable[[], object] | None = None) -> Layout | str:
        """The model's layout; why the experts of ``tasks`` cannot be served if they cannot."""
        if not isinstance(self._model, nn.Module):
            return "deltas needs a bank that is attached to a module, not to a state dict"
        weights = self._weights(dict.fromkeys(tasks, 1.0), "tasks")
        names = self._touched(weights) + list(self._averages(weights))
        with turn(self._shared):
            layout = Layout(self._model)
            reason = unserved(layout, names, run)
        return layout if reason is None else f"deltas cannot serve {reason}"

    def _belongs_to(self, model: nn.Module) -> bool:
        """Whether the tensors that experts change are those of ``model``: that of the bank, or one that shares them."""
        held = set()
        for tensor in (*model.parameters(), *model.buffers()):
            with suppress(ArgumentError):  # what has no memory of its own is none of them
                held.add(dense(tensor, "model").data_ptr())
        return all(self._tensor(name).data_ptr() in held for name in self._shapes)

    def _weights(self, experts: str | Mapping[str, float], argument: str = "experts") -> dict[str, float]:
        if not isinstance(experts, str | Mapping):
            raise ArgumentError(f"experts must be the name of one, or map names to weights, got {experts!r}")
        given: Mapping[str, object] = {experts: 1.0} if isinstance(experts, str) else experts
        weights = {}
        for task, weight in given.items():
            if task not in self._experts:
                known = ", ".join(map(repr, self._experts))
                raise ArgumentError(f"{argument}: no expert {task!r}; the bank has {known}")
            weights[task] = number(weight.item() if isinstance(weight, Tensor) and weight.numel() == 1 else weight)
            if not math.isfinite(weights[task]):
                raise ArgumentError(f"experts: the weight of {task!r} must be a finite number, got {weight!r}")
        return {task: weight for task, weight in weights.items() if weight != 0}

    def _touched(self, weights: Mapping[str, float]) -> list[str]:
        if len(weights) == 1:
            return list(self._parts[next(iter(weights))])
        return sorted({name for task in weights for name in self._parts[task]})

    def _averages(self, weights: Mapping[str, float]) -> dict[str, list[tuple[Tensor, float]]]:
        """For each running statistic that experts replace, theirs and the share of each."""
        placed: dict[str, list[tuple[Tensor, float]]] = {}
        for task, weight in weights.items():
            for name, values in self._statistics[task].items():
                placed.setdefault(name, []).append((values, weight * self._experts[task].share))
        averages = {}
        for name, terms in sorted(placed.items()):
            shares, scale = convex([share for _, share in terms], 1.0)
            averages[name] = [(values, scale * share) for (values, _), share in zip(terms, shares, strict=True)]
        return averages

    def _moves(self, name: str, terms: Iterable[tuple[Tensor, float]]) -> list[tuple[Tensor, float]]:
        """How far it is from a running statistic to those of experts, in float32 or float64."""
        tensor = self._tensor(name).detach()
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return [(values.to(tensor) - tensor, share) for values, share in terms]

    def _of_samples(self, samples: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
        """Of each running statistic that an expert of a batch replaces, its values for each sample, float32 [N, C]."""
        rows: dict[str, Tensor] = {}
        for j, weights in enumerate(samples):
            for name, terms in self._averages(weights).items():
                if name not in rows:
                    rows[name] = self._tensor(name).detach().float().repeat(len(samples), 1)
                for move, share in self._moves(name, terms):
                    rows[name][j] += share * move
        return rows

    def _switch(self, weights: Mapping[str, float], combine: Combine, tensors: Mapping[str, Tensor]) -> Switch:
        """What changes ``tensors``; kept for an expert that is switched on alone, while they stay where they are."""
        if len(weights) != 1:
            return self._new_switch(weights, combine, tensors)
        ((task, weight),) = weights.items()
        kept_weight, kept = self._switches.get((task, combine), (weight, None))
        if kept is None or kept_weight != weight or not kept.fits([*tensors.values()]):
            kept = self._new_switch(weights, combine, tensors)
            kept.wait()  # the next call may run on another stream
            self._switches[task, combine] = weight, kept
        return kept

    def _new_switch(self, weights: Mapping[str, float], combine: Combine, tensors: Mapping[str, Tensor]) -> Switch:
        updates = []
        for name, tensor in tensors.items():
            entries, scale = self._update(name, tensor, weights)
            origin = self._origin(name, tensor, entries, weights) if combine == "replace" else None
            updates.append(Update(tensor, entries, scale, origin))
        return Switch(updates, scratch=self._scratch)

    def _update(self, name: str, tensor: Tensor, weights: Mapping[str, float]) -> tuple[SparseVector, float]:
        """sum_i w_i e_i of one tensor, as entries and a factor."""
        terms = [
            (self._vector(task, name, tensor.device), weight * self._experts[task].mu)
            for task, weight in weights.items()
            if name in self._parts[task]
        ]
        return terms[0] if len(terms) == 1 else (weighted_sum(terms), 1.0)

    def _sparse(self, task: str) -> bool:
        """Whether an expert holds nothing but single entries."""
        return len(self._entries[task]) == len(self._experts[task].tensors)

    def _dense_terms(self, name: str, weights: Mapping[str, float]) -> Iterator[tuple[Tensor, float]]:
        """w_i e_i of one tensor, one after the other, as what is added and its factor."""
        for task, weight in weights.items():
            if name in self._parts[task]:
                expert = self._experts[task]
                yield self._dense(task, name), weight * expert.mu

    def _change(self, task: str, name: str) -> tuple[Change, float]:
        """e_i of one tensor in the form that costs least in the forward pass, and its factor."""
        parts, expert, tensor = self._parts[task][name], self._experts[task], self._tensor(name)
        if self._sparse(task):
            return self._update(name, tensor, {task: 1.0})
        kept = expert.tensors[parts[0].entry]
        if len(parts) == 1 and parts[0].piece is None and isinstance(kept, LowRankTensor) and tensor.ndim == 2:
            left, right = kept.factors
            return Product(left.to(tensor.device), right.to(tensor.device)), expert.mu
        return self._dense(task, name), expert.mu

    def _dense(self, task: str, name: str) -> Tensor:
        """e_i of one tensor as it is now, without mu: masks select from what it has beyond the base."""
        parts, entries, tensor = self._parts[task][name], self._experts[task].tensors, self._tensor(name)
        seen: dict[str, Seen] = {}
        vector: Tensor | None = None
        for part in parts:
            entry = entries[part.entry]
            if entry.keeps:
                self._seen[part.entry] = tuple(kept.to(tensor.device) for kept in self._seen[part.entry])
                seen[part.entry] = self._seen[part.entry]
            elif entry.relative:
                vector = self._merged_vector(name) if vector is None else vector
                seen[part.entry] = seen_by(part, entry, vector)
        return gathered_dense(parts, entries, tensor, seen)

    def _merged_vector(self, name: str) -> Tensor:
        """theta_m - theta_0 of one tensor, as the backbone has it, or else the model now."""
        assert self._base is not None
        device = self._tensor(name).device
        tensor = self._tensor(name).detach() if self._backbone is None else self._backbone.read(name).to(device)
        base = self._base.read(name).to(device)
        compute = torch.promote_types(torch.promote_types(tensor.dtype, base.dtype), torch.float32)
        return tensor.to(compute) - base.to(compute)

    def _keep(self, task: str, expert: Expert) -> None:
        """Look at the merged task vectors for codings that take long to do it, before any expert changes them."""
        for name, parts in self._parts[task].items():
            for part in parts:
                entry = expert.tensors[part.entry]
                if not entry.keeps:
                    continue
                if part.entry not in self._seen:
                    self._seen[part.entry] = seen_by(part, entry, self._merged_vector(name))
                try:
                    entry.check(self._seen[part.entry])
                except ArgumentError as error:
                    raise ArgumentError(f"experts: {task!r}, {part.entry!r}: {error}") from None

    def _vector(self, task: str, name: str, device: torch.device) -> SparseVector:
        vector = self._vectors.get((task, name))
        if vector is None or vector.indices.device != device:
            vector = gathered(self._parts[task][name], self._entries[task]).to(device)
            self._vectors[task, name] = vector
        return vector

    def _origin(self, name: str, tensor: Tensor, update: SparseVector, weights: Mapping[str, float]) -> Tensor:
        """theta_0 at the entries of an update, in the model's dtype; kept for experts that are switched on alone."""
        assert self._base is not None
        key = (next(iter(weights)), name)
        cached = self._origins.get(key) if len(weights) == 1 else None
        if cached is None or cached.device != tensor.device or cached.dtype != tensor.dtype:
            base = self._base.read(name).reshape(-1)
            cached = base[update.indices.long().to(base.device)].to(tensor.device, tensor.dtype)
            if len(weights) == 1:
                self._origins[key] = cached
        return cached

    def _tensor(self, name: str) -> Tensor:
        """The model's tensor as it is now: a module may have been moved or converted since.

        ArgumentError if it has none any more, or one of another shape.
        """
        held = self._held(name)
        if held is None:
            raise ArgumentError(f"model: {name!r}, which the bank was attached to, is gone")
        tensor = dense(held, f"model: {name!r}")
        attached = self._shapes.setdefault(name, tensor.shape)
        if tensor.shape != attached:
            raise ArgumentError(
                f"model: {name!r} has shape {tuple(tensor.shape)} now, the bank was attached to {tuple(attached)}"
            )
        return tensor

    def _held(self, name: str) -> Tensor | None:
        """Only what a module holds counts: what it computes, as a parametrized weight, cannot be changed in place."""
        if not isinstance(self._model, nn.Module):
            return self._model.get(name)
        *path, attribute = name.split(".")
        owner: Any = self._model
        try:
            for part in path:
                owner = owner._modules[part]
            kind = owner._parameters if attribute in owner._parameters else owner._buffers
            held: Tensor | None = kind[attribute]
        except (AttributeError, KeyError):  # it has been replaced by None, or deleted
            return None
        return held

    def _opened(self, source: Source, argument: str) -> Checkpoint:
        """Another checkpoint of the model, under its names and in its layout."""
        base = dequantised(Checkpoint.open(source, argument=argument))
        layout = self._placement.layout if base.specs.keys() - self._placement.names else None
        if layout is not None and base.specs.keys() & (layout.files.keys() - layout.module.keys()):
            base = InModuleLayout(base, layout)
        return renamed(base, Naming(self._placement.names).of(base.specs))

    def _placed(self, task: str, tensors: Mapping[str, ExpertTensor] | Mapping[str, Tensor]) -> dict[str, list[Part]]:
        try:
            return self._placement.parts(tensors)
        except KeyError as error:
            raise ArgumentError(f"experts: {task!r} has an entry {error.args[0]!r}, which the model lacks") from None
        except ValueError as error:
            raise ArgumentError(f"experts: {task!r}: {error}") from None

    def _placed_statistics(self, task: str, expert: Expert) -> dict[str, Tensor]:
        """An expert's running statistics in float32, under the model's names."""
        placed: dict[str, Tensor] = {}
        for name, parts in self._placed(task, expert.statistics).items():
            placed[name] = expert.statistics[parts[0].entry].float()
            if len(parts) > 1 or parts[0].piece is not None or self._tensor(name).shape != placed[name].shape:
                raise ArgumentError(f"experts: {parts[0].entry!r} of {task!r} does not fit the model's {name!r}")
        return placed

    def _check(self, task: str, expert: Expert) -> None:
        if self._base is None and any(tensor.relative for tensor in expert.tensors.values()):
            raise ArgumentError(f"base must be given: {task!r} is of values {expert.values}, which need it (--base)")
        for name, parts in self._parts[task].items():
            tensor = self._tensor(name)
            shape = tuple(tensor.shape)
            kept = expert.tensors[parts[0].entry].shape if parts[0].piece is None else shape
            if shape != kept:
                raise ArgumentError(f"experts: {name!r} of {task!r} has shape {kept}, the model's has {shape}")
            if tensor.dtype not in MERGEABLE or tensor.layout != torch.strided:
                raise ArgumentError(f"experts: {name!r} of the model must be a dense float tensor, not {tensor.dtype}")
            if internal_overlap(shape, tensor.stride()):
                raise ArgumentError(f"experts: {name!r} of the model may overlap itself in memory {tensor.stride()}")
            for other in (self._base, self._backbone):
                spec = None if other is None else other.specs.get(name)
                if other is not None and (spec is None or spec.shape != shape):
                    raise CheckpointError(f"{other.label}: tensor {name!r} is missing or has another shape")
        self._check_apart(task)

    def _check_apart(self, task: str) -> None:
        """Entries that are one in the model, or have some memory in common there, would be changed twice."""
        placed = list(self._parts[task].values())
        twice = [parts for parts in placed if len(parts) > 1 and parts[0].piece is None]
        pair = overlapping_pair([self._tensor(name) for name in self._parts[task]])
        if pair is not None:
            twice.append([part for i in pair for part in placed[i]])
        if twice:
            names = f"{twice[0][0].entry!r} and {twice[0][-1].entry!r}"
            raise ArgumentError(f"experts: {task!r} has {names}, which share memory in the model")


def _checked(experts: object) -> dict[str, Expert]:
    if not isinstance(experts, Mapping) or not all(isinstance(expert, Expert) for expert in experts.values()):
        hint = "; ExpertBank.load reads a folder" if isinstance(experts, str | os.PathLike) else ""
        raise ArgumentError(f"experts must map tasks to experts, got {type(experts).__name__}{hint}")
    return dict(experts)
