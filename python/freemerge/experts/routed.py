"""A merged model that serves each sample of a batch with the experts its router chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import function
from ..errors import ArgumentError
from .bank import Combine, ExpertBank
from .deltas import compiled
from .router import PooledState, Router

WAYS = 64  # of a model through its modules, of which it is remembered whether one pass serves them


@dataclass(frozen=True)
class Routed:
    """The result of a routed batch.

    Attributes:
        output: what the model returns, every tensor of it in the order of the samples.
        weights: expert weights of each sample, (N, K), columns in the order of ``tasks``.
        tasks: names of the experts.
    """

    output: Any
    weights: Tensor
    tasks: tuple[str, ...]

    @property
    def served(self) -> tuple[str | None, ...]:
        """Name of the expert with the largest weight for each sample; ``None`` where the backbone served alone."""
        best, columns = self.weights.max(1)
        return tuple(
            self.tasks[column] if weight > 0 else None
            for weight, column in zip(best.tolist(), columns.tolist(), strict=True)
        )


class RoutedModel:
    """theta* = theta_m + sum_i w_i(x) e_i, sample by sample (arXiv 2411.16815, section 4.3).

    Args:
        model: the merged backbone that ``bank`` is attached to.
        bank: its experts, an :class:`ExpertBank` of at least one.
        router: a :class:`Router`, or any function of features (N, D) that returns weights (N, K); such a function's
            columns follow the order of the bank.
        features: the name of a submodule, whose pooled output on the backbone is the router's input, or a function of
            the model's arguments that returns features (N, D).
        combine: how an expert is combined with the backbone, see :meth:`ExpertBank.active`.

    Calling it takes the model's own arguments. Samples with the same weights form one group, and each group is one
    forward pass with its experts switched on: a top-1 batch costs a pass for each expert that it needs. A batch with
    more mixtures than there are experts, as softmax weights make, is a single pass with :meth:`ExpertBank.deltas`, if
    ``combine`` is "add", the model is not compiled, and :meth:`ExpertBank.serves_deltas` gives no reason against it.
    That takes a pass of one sample the first time, and again for other arguments that are not tensors, other sorts of
    tensors, and another training mode, with which a model may go around its modules; one that does so for any other
    reason needs a RoutedModel of its own. Both ways agree to rounding. On a CPU, such a batch of two to eight experts
    takes a sixth to two thirds of the time with samples of up to 32 tokens, and up to a third more with 128
    (``benchmarks/experts.py``).

    Tensor arguments whose first dimension is the batch are split along it, all others are given to every pass. Raises
    ArgumentError if the weights do not fit the bank, or if the model returns something other than tensors with the
    batch in front (in tuples, lists or mappings) and None.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: ExpertBank,
        router: Router | Callable[[Tensor], Tensor],
        *,
        features: str | Callable[..., Tensor],
        combine: Combine = "add",
    ) -> None:
        if not isinstance(bank, ExpertBank):
            raise ArgumentError(f"bank must be an ExpertBank, got {type(bank).__name__}")
        if not bank:
            raise ArgumentError("bank has no experts to choose from")
        for name, value in (("model", model), ("router", router)):
            function(name, value)
        if not isinstance(features, str):
            function("features", features)
        if isinstance(model, nn.Module) and not bank._belongs_to(model):
            raise ArgumentError("model must be the one that the bank is attached to, or wrap it")
        self.model, self.bank, self.router, self.combine = model, bank, router, combine
        self.features = PooledState(model, features) if isinstance(features, str) else features
        self.tasks: tuple[str, ...] = tuple(getattr(router, "tasks", None) or bank)
        unknown = [task for task in self.tasks if task not in tuple(bank)]
        if unknown:
            raise ArgumentError(f"router: the bank has no expert {', '.join(map(repr, unknown))}; it has {list(bank)}")
        self._one_pass: dict[object, bool] = {}  # what a pass of one sample has shown about deltas, by its way

    def __call__(self, *args: Any, **kwargs: Any) -> Routed:
        """Run a batch; gradients are recorded or not as the caller's context says, except for the routing."""
        with self.bank.active({}):  # the features are the backbone's, whatever other threads switch on
            features = _tensor("features", self.features(*args, **kwargs))
        if not features.ndim:
            raise ArgumentError("features must return a tensor with a row for each sample, got one without dimensions")
        weights = self._weights(features)
        batch = len(weights)
        if not batch:
            raise ArgumentError("the batch is empty")
        distinct, group_of = torch.unique(weights, dim=0, return_inverse=True)
        mixtures = int(distinct.any(1).sum())
        if mixtures > len(self.tasks) and self._serves_deltas(args, kwargs, batch):
            with self.bank.deltas([self._experts(row) for row in weights]):
                output = self.model(*args, **kwargs)
            return Routed(_join([output], [batch], torch.arange(batch, device="cpu")), weights, self.tasks)
        rows = [torch.nonzero(group_of == group).flatten() for group in range(len(distinct))]
        outputs = []
        for group, members in zip(distinct, rows, strict=True):
            own_args, own_kwargs = _take((args, kwargs), members, batch)
            with self.bank.active(self._experts(group), combine=self.combine):
                outputs.append(self.model(*own_args, **own_kwargs))
        order = torch.cat(rows).argsort()
        return Routed(_join(outputs, [len(members) for members in rows], order), weights, self.tasks)

    def _serves_deltas(self, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int) -> bool:
        if self.combine != "add" or self.bank.serves_deltas(self.tasks) is not None:
            return False
        if isinstance(self.model, nn.Module) and compiled(self.model):  # around the module that the bank knows
            return False
        modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
        way = tuple([module.training for module in modules]), _kind((args, kwargs))
        if way not in self._one_pass:
            if len(self._one_pass) >= WAYS:
                self._one_pass.clear()
            one_args, one_kwargs = _take((args, kwargs), torch.tensor([0], device="cpu"), batch)
            reason = self.bank.serves_deltas(self.tasks, lambda: self.model(*one_args, **one_kwargs))
            self._one_pass[way] = reason is None
        return self._one_pass[way]

    def _weights(self, features: Tensor) -> Tensor:
        weights = _tensor("router", self.router(features))
        if weights.shape != (len(features), len(self.tasks)):
            raise ArgumentError(
                f"router: expected weights {(len(features), len(self.tasks))}, got {tuple(weights.shape)}"
            )
        return weights.detach().float().cpu()

    def _experts(self, weights: Tensor) -> str | dict[str, float]:
        """A name for a single expert at full strength, else every expert's weight."""
        chosen = {task: weight for task, weight in zip(self.tasks, weights.tolist(), strict=True) if weight != 0}
        return next(iter(chosen)) if list(chosen.values()) == [1.0] else chosen


def _tensor(name: str, value: object) -> Tensor:
    """What a function of the user has returned."""
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} must return a tensor, got {type(value).__name__}")
    return value


def _take(value: Any, rows: Tensor, batch: int) -> Any:
    """The given rows of every tensor with ``batch`` of them in a structure of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return _like(value, {key: _take(item, rows, batch) for key, item in value.items()})
    if isinstance(value, tuple | list):
        items = [_take(item, rows, batch) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _kind(value: Any) -> object:
    """What a model may choose its way by: the structure of its arguments, flags and words in it, and what sort of
    tensors. Of numbers, which are steps and temperatures, only that they are."""
    if isinstance(value, Tensor):
        return value.dtype, value.ndim
    if isinstance(value, Mapping):
        return type(value), tuple((key, _kind(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_kind, value))
    return value if value is None or isinstance(value, bool | str) else type(value)


def _like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same type with other values: types such as transformers' BatchEncoding have attributes."""
    if not isinstance(mapping, MutableMapping):
        return items
    made = copy(mapping)
    for key, item in items.items():
        made[key] = item
    return made


def _form(output: Any) -> tuple[object, ...]:
    """What outputs must have in common to be joined: their type, and the keys or the number of what they hold."""
    held = tuple(output) if isinstance(output, Mapping) else len(output) if isinstance(output, tuple | list) else None
    return type(output), held


def _join(outputs: Sequence[Any], sizes: Sequence[int], order: Tensor) -> Any:
    """The groups' outputs as one, rows in the batch's order; the inverse of :func:`_take`."""
    first = outputs[0]
    if len({_form(output) for output in outputs}) > 1:
        kinds = " and ".join(dict.fromkeys(type(output).__name__ for output in outputs))
        raise ArgumentError(f"the model returned {kinds} of different forms for different samples")
    if first is None:
        return None
    if isinstance(first, Tensor):
        for output, size in zip(outputs, sizes, strict=True):
            if not output.ndim or len(output) != size:
                raise ArgumentError(f"the model returned shape {tuple(output.shape)} for a batch of {size}")
        return torch.cat(list(outputs))[order.to(first.device)]
    if isinstance(first, Mapping):
        return _like(first, {key: _join([output[key] for output in outputs], sizes, order) for key in first})
    if isinstance(first, tuple | list):
        items = [_join(group, sizes, order) for group in zip(*outputs, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    raise ArgumentError(f"the model returned {type(first).__name__}, which cannot be split by sample")
