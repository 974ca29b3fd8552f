"""Experts in the forward pass: every module adds what its experts' entries contribute, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..backends.sparse import SparseVector
from ..dense import dense, location, without_autocast
from ..errors import ArgumentError
from ..overlap import overlapping_pairs
from .contributions import BATCH_NORMS, SERVED, Product, batch_norm, contribution_of

Change = SparseVector | Product | Tensor  # of a tensor: single entries, factors, or all of it
Updates = Mapping[str, tuple[Change, float]]  # each touched tensor's change and factor
_Term = tuple[Tensor, dict[str, Any]]  # an expert's weight for each sample, and its changes of a module's parameters
_BLOCK = 1 << 20  # output elements that are computed together, so that they stay in the cache


def unserved(layout: Layout, names: Iterable[str], run: Callable[[], object] | None = None) -> str | None:
    """Why updates of these tensors cannot be served in the forward pass; None if they can.

    Modules alone do not tell whether a model calls them with the batch in front, and whether something else uses their
    parameters. ``run``, a forward pass of one sample, shows it.
    """
    owners, names, in_graphs, overlaps = layout.owners, list(names), compiled(layout.model), layout.overlaps()
    for name in names:
        if name in overlaps:
            return f"{name!r}: it has a part of its memory in common with {overlaps[name]!r}"
        if name not in owners:
            return f"{name!r}: it is not a parameter, nor a batch norm's"
        for module, attribute in owners[name]:
            if module in in_graphs:
                return f"{name!r}: its module is compiled, which leaves out what is hooked to it later"
            if contribution_of(module) is None:
                replaced = ", whose forward was replaced" if "forward" in vars(module) else ""
                return f"{name!r}: it belongs to a {type(module).__name__}{replaced}"
            if attribute not in SERVED:  # as of pruned modules, which make a weight of it before each pass
                return f"{name!r}: it is neither weight nor bias of its {type(module).__name__}"
            if getattr(module, "max_norm", None) is not None:
                return f"{name!r}: its embedding changes the weights that are looked up (max_norm)"
            if isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None):
                return f"{name!r}: its batch norm mixes the samples of a batch; use model.eval()"
    return None if run is None else _observed(layout, names, run)


@contextmanager
def forward_deltas(
    layout: Layout, weights: Tensor, experts: Sequence[Updates], statistics: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Within the block, the model computes sample j as if ``sum_i weights[j, i] * experts[i]`` were added to it.

    ``statistics``: running means and variances of batch norms, [N, C]; sample j is normalised by row j.

    :func:`unserved` must be asked before. Raises ArgumentError for a batch norm that such a block around this one
    serves, if either has statistics for it: what changes of its weights add depends on them. Raises it in the forward
    pass for a module whose input has neither one row per sample nor a single row.
    """
    owners, batch = layout.owners, len(weights)
    terms: dict[nn.Module, list[_Term]] = {}
    for column, updates in zip(weights.t(), experts, strict=True):
        by_module: dict[nn.Module, dict[str, Any]] = {}
        for name, (update, scale) in updates.items():
            delta = _delta(layout.tensors[name], update, scale)
            for module, attribute in owners[name]:
                by_module.setdefault(module, {})[attribute] = delta
        for module, deltas in by_module.items():
            terms.setdefault(module, []).append((column, deltas))
    names = {module: name or "the model" for name, module in layout.model.named_modules()}
    normed: dict[nn.Module, dict[str, Tensor]] = {}
    for name, rows in (statistics or {}).items():
        for module, attribute in owners[name]:
            normed.setdefault(module, {})[attribute] = rows
    with ExitStack() as hooks:
        for module in {**normed, **terms}:
            if isinstance(module, BATCH_NORMS):
                hooks.enter_context(_alone(module, names[module], module in normed))
            hook = _hook(names[module], batch, terms.get(module, []), normed.get(module))
            # Before hooks of others, whose work on the output is that on all of it.
            hooks.enter_context(_hooked(partial(module.register_forward_hook, prepend=True), hook))
        yield


_batch_norms: WeakKeyDictionary[nn.Module, list[bool]] = WeakKeyDictionary()  # those that open blocks serve


@contextmanager
def _alone(module: nn.Module, name: str, statistics: bool) -> Iterator[None]:
    """A block that serves a batch norm, inside of no other one if one of them has statistics for it."""
    blocks = _batch_norms.setdefault(module, [])
    if blocks and (statistics or any(blocks)):
        raise ArgumentError(f"deltas: {name!r} has statistics of samples, which nested blocks cannot combine")
    blocks.append(statistics)
    try:
        yield
    finally:
        blocks.pop()


@contextmanager
def _hooked(register: Callable[[Callable[..., Any]], RemovableHandle], hook: Callable[..., Any]) -> Iterator[None]:
    """A hook that works within the block; in copies of the module that were made there, it does nothing any more."""
    held = [hook]
    handle = register(lambda *args: held[0](*args) if held else None)
    try:
        yield
    finally:
        held.clear()
        handle.remove()


def compiled(model: nn.Module) -> set[nn.Module]:
    """The modules inside of those that torch.compile has made, or has been told to make, a graph of."""
    graphs = [m for m in model.modules() if "_orig_mod" in m._modules or m._compiled_call_impl is not None]
    return {inner for graph in graphs for inner in graph.modules()}


class Layout:
    """The parameters and buffers of a model as it is now, by all their names: who uses them, and which overlap."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = _tensors(model)
        identities = {id(tensor): _identity(tensor) for tensor in self.tensors.values()}
        users: dict[object, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for attribute, tensor in _used(module):
                users.setdefault(identities[id(tensor)], []).append((module, attribute))
        self._alike: dict[object, list[str]] = {}  # the names of tensors that are one
        for name, tensor in self.tensors.items():
            self._alike.setdefault(identities[id(tensor)], []).append(name)
        # The modules that use a tensor, and what they call it.
        self.owners = {name: users[key] for key, names in self._alike.items() if key in users for name in names}

    def overlaps(self) -> dict[str, str]:
        """Tensors that are not one with another, but have a part of their memory in common with it."""
        groups = [names for identity, names in self._alike.items() if not isinstance(identity, int)]
        pairs = [*overlapping_pairs([self.tensors[names[0]] for names in groups])]
        return {name: groups[j][0] for pair in pairs for i, j in (pair, pair[::-1]) for name in groups[i]}


def _used(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a module computes with itself, and what it calls them."""
    yield from module.named_parameters(recurse=False)
    if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
        yield from ((name, getattr(module, name)) for name in ("running_mean", "running_var"))
    if isinstance(module, nn.MultiheadAttention):  # it uses the parameters of its out_proj without calling it
        yield from ((f"out_proj.{name}", parameter) for name, parameter in module.out_proj.named_parameters())


def _identity(tensor: Tensor) -> object:
    """What tensors have in common that are one, such as two parameters over one memory; of others, their own number."""
    with suppress(ArgumentError):  # what has no memory of its own
        return location(tensor) if dense(tensor, "model").numel() else id(tensor)
    return id(tensor)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _observed(layout: Layout, parameters: Iterable[str], run: Callable[[], object]) -> str | None:
    """What a forward pass of one sample shows against serving these parameters."""
    names = {module: name for name in parameters for module, _ in layout.owners[name]}
    uses = _Uses({_identity(layout.tensors[name]): name for name in parameters})
    called = set()

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        uses.running += 1

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        uses.running -= 1
        called.add(module)
        if not all(isinstance(x, Tensor) and x.ndim and len(x) == 1 for x in (*(args[:1] or [None]), output)):
            uses.reasons.append(f"{names[module]!r}: its module does not get the batch in front")

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(uses)
        run()
    uses.reasons += [f"{name!r}: its module is not called" for m, name in names.items() if m not in called]
    return uses.reasons[0] if uses.reasons else None


class _Uses(TorchFunctionMode):
    """Notes which parameters are used while none of the modules runs that they belong to."""

    def __init__(self, parameters: Mapping[object, str]) -> None:
        super().__init__()
        self._parameters = parameters
        self.running = 0
        self.reasons: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.running and isinstance(result, Tensor | tuple) and not isinstance(result, torch.Size):
            for arg in (*args, *kwargs.values()):
                for used in arg if isinstance(arg, tuple | list) else [arg]:
                    name = self._parameters.get(_identity(used)) if isinstance(used, Tensor) else None
                    if name is not None:
                        self.reasons.append(f"{name!r}: it is used outside of its module")
        return result


def _hook(
    name: str, batch: int, terms: Sequence[_Term], statistics: Mapping[str, Tensor] | None
) -> Callable[[Any, tuple[Any, ...], Any], Tensor]:
    """What adds the terms to a module's output, that of a batch norm with ``statistics`` of each sample.

    Experts of the same samples share what only depends on the input.
    """
    groups: dict[tuple[int, ...], list[_Term]] = {}
    for column, deltas in terms:
        rows = column.nonzero().squeeze(1)
        groups.setdefault(tuple(rows.tolist()), []).append((column[rows], deltas))

    def add(module: Any, args: tuple[Any, ...], output: Any) -> Tensor:
        x = args[0] if args else None
        if isinstance(x, Tensor) and isinstance(output, Tensor) and x.ndim and len(x) == 1:
            # An input that all samples share, such as position ids, gets an output for each of them.
            x, output = x.expand(batch, *x.shape[1:]), output.expand(batch, *output.shape[1:])
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not x.ndim or len(x) != batch:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"deltas: {name!r} got {shape} where the first dimension should be the batch, {batch}")
        kind = contribution_of(module)
        assert kind is not None
        dtype = torch.promote_types(output.dtype, torch.float32)
        block = max(1, _BLOCK * batch // max(1, output.numel()))
        with without_autocast(x.device):
            if statistics is None:
                total = output.to(dtype, copy=True)
            else:  # anew, as the input may not be one of its dtype any more
                x = _renormed(module, x, statistics, dtype)
                total = batch_norm(module, x, module.weight, module.bias)
            for samples, members in groups.items():
                for start in range(0, len(samples), block):
                    part = slice(start, start + block)
                    rows = part if len(samples) == batch else torch.tensor(samples[part], device=x.device)
                    contribution = kind(module, x[rows], output[rows].shape, dtype)
                    for weights, deltas in members:
                        contribution.add(weights[part].to(x.device, dtype), deltas)
                    total[rows] += contribution.result()
        return total.to(output.dtype)

    return add


def _renormed(module: Any, x: Tensor, statistics: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """An input of which a batch norm's own statistics make what those of each sample make of ``x``."""
    now = {"running_mean": module.running_mean[None], "running_var": module.running_var[None]}
    (mean, variance), (own_mean, own_variance) = (
        [values[key].to(x.device, dtype).view(-1, x.shape[1], *[1] * (x.ndim - 2)) for key in now]
        for values in (now, {**now, **statistics})
    )
    factor = ((variance + module.eps) / (own_variance + module.eps)).sqrt()
    changed: Tensor = (x.to(dtype) - own_mean) * factor + mean
    return changed


def _delta(weights: Tensor, update: Change, scale: float) -> Tensor | Product:
    """An update as a tensor, sparse if it is entries of a matrix; float32, or float64 for float64 weights."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    if isinstance(update, Product):
        return Product(update.left.to(dtype) * scale, update.right.to(dtype, copy=True))  # not of inference mode
    if isinstance(update, Tensor):
        return update.to(dtype) * scale
    values = update.values.to(dtype) * scale
    indices = update.indices.long()
    if weights.ndim != 2:
        whole = torch.zeros(weights.numel(), dtype=dtype, device=weights.device)
        whole[indices] = values
        return whole.view(weights.shape)
    width = weights.shape[1]
    row = torch.div(indices, width, rounding_mode="floor")
    return torch.sparse_coo_tensor(
        torch.stack([row, indices - row * width]),
        values,
        weights.shape,
        device=values.device,
        is_coalesced=True,
        check_invariants=False,
    )
