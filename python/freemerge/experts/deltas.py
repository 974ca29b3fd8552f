"""Experts in the forward pass: every module adds what its experts' entries contribute, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.sparse import SparseVector
from ..errors import ArgumentError

Updates = Mapping[str, tuple[SparseVector, float]]
Mixture = tuple[Tensor, Updates]  # rows of the batch, and each touched tensor's entries and factor

# (module, input rows, deltas of its parameters by attribute) -> what to add to the output rows. All these modules are
# linear in their weight and bias, so the delta's output is the module applied with the delta for parameters.
_Contribution = Callable[[Any, Tensor, Mapping[str, Tensor]], Tensor]


@contextmanager
def forward_deltas(model: nn.Module, batch: int, mixtures: Sequence[Mixture]) -> Iterator[None]:
    """Within the block, ``model`` computes the rows of each mixture as if its updates were added to the weights."""
    owners = _owners(model)
    parts: dict[nn.Module, list[tuple[Tensor, dict[str, Tensor]]]] = {}
    for rows, updates in mixtures:
        by_module: dict[nn.Module, dict[str, Tensor]] = {}
        for name, (update, scale) in updates.items():
            prefix, _, attribute = name.rpartition(".")
            weights = getattr(model.get_submodule(prefix), attribute)
            delta = _delta(weights, update, scale)
            for module, place in owners.get(id(weights), []):
                _contribution(module, name)
                by_module.setdefault(module, {})[place] = delta
        for module, deltas in by_module.items():
            parts.setdefault(module, []).append((rows, deltas))
    names = {module: name or "the model" for name, module in model.named_modules()}
    with ExitStack() as hooks:
        for module, own in parts.items():
            hooks.callback(module.register_forward_hook(_hook(names[module], batch, own)).remove)
        yield


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter, by its id: several if it is tied."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, attribute))
        if isinstance(module, nn.MultiheadAttention):  # it uses the weights of its out_proj without calling it
            owners.setdefault(id(module.out_proj.weight), []).append((module, "out_proj.weight"))
            owners.setdefault(id(module.out_proj.bias), []).append((module, "out_proj.bias"))
    return owners


def _contribution(module: nn.Module, name: str) -> _Contribution:
    for kind, contribution in _CONTRIBUTIONS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return contribution
    raise ArgumentError(f"deltas cannot serve {name!r}: it belongs to a {type(module).__name__}")


def _delta(weights: Tensor, update: SparseVector, scale: float) -> Tensor:
    """An update as a tensor: sparse for a matrix, dense for the small rest; float32, or float64 for float64 weights."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    values = update.values.to(dtype) * scale
    indices = update.indices.long()
    if weights.ndim != 2:
        dense = torch.zeros(weights.numel(), dtype=dtype, device=weights.device)
        dense[indices] = values
        return dense.view(weights.shape)
    width = weights.shape[1]
    row = torch.div(indices, width, rounding_mode="floor")
    return torch.sparse_coo_tensor(
        torch.stack([row, indices - row * width]), values, weights.shape, is_coalesced=True, check_invariants=False
    )


def _hook(
    name: str, batch: int, parts: Sequence[tuple[Tensor, dict[str, Tensor]]]
) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        x = args[0] if args else None
        if isinstance(x, Tensor) and isinstance(output, Tensor) and x.ndim and len(x) == 1:
            # What is the same for all samples, as position embeddings, no longer is.
            x, output = x.expand(batch, *x.shape[1:]), output.expand(batch, *output.shape[1:])
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not x.ndim or len(x) != batch:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"deltas: {name!r} got {shape} where the first dimension should be the batch, {batch}")
        contribution = _contribution(module, name)
        result = output.clone()
        for rows, parameters in parts:
            where = rows.to(x.device)
            result[where] += contribution(module, x[where], parameters).to(output.dtype)
        return result

    return add


def _dtype(deltas: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(deltas.values())).dtype


def _linear(module: nn.Linear, x: Tensor, deltas: Mapping[str, Tensor]) -> Tensor:
    shape = (*x.shape[:-1], module.out_features)
    if "weight" not in deltas:
        return deltas["bias"].expand(shape)
    weight = deltas["weight"]
    flat = x.reshape(-1, module.in_features).to(weight.dtype)
    out: Tensor = torch.sparse.mm(weight, flat.t()).t().reshape(shape)
    return out + deltas["bias"] if "bias" in deltas else out


def _embedding(module: nn.Embedding, x: Tensor, deltas: Mapping[str, Tensor]) -> Tensor:
    entry_rows, columns = deltas["weight"].indices()
    values = deltas["weight"].values()
    starts = torch.searchsorted(entry_rows, torch.arange(module.num_embeddings + 1, device=x.device))
    used, place = torch.unique(x, return_inverse=True)
    lengths = starts[used + 1] - starts[used]
    row = torch.repeat_interleave(torch.arange(len(used), device=x.device), lengths)
    offset = torch.arange(len(row), device=x.device) - (lengths.cumsum(0) - lengths)[row]
    entry = starts[used][row] + offset
    dense = torch.zeros(len(used), module.embedding_dim, dtype=values.dtype, device=x.device)
    dense[row, columns[entry]] = values[entry]
    return dense[place]


def _layer_norm(module: nn.LayerNorm, x: Tensor, deltas: Mapping[str, Tensor]) -> Tensor:
    normal = F.layer_norm(x.to(_dtype(deltas)), module.normalized_shape, None, None, module.eps)
    return _affine(normal, deltas, tuple(module.normalized_shape))


def _group_norm(module: nn.GroupNorm, x: Tensor, deltas: Mapping[str, Tensor]) -> Tensor:
    normal = F.group_norm(x.to(_dtype(deltas)), module.num_groups, None, None, module.eps)
    return _affine(normal, deltas, (-1, *[1] * (x.ndim - 2)))


def _batch_norm(module: nn.BatchNorm2d, x: Tensor, deltas: Mapping[str, Tensor]) -> Tensor:
    if module.training or module.running_mean is None or module.running_var is None:
        raise ArgumentError("deltas: a batch norm in training mode mixes the samples of a batch; use model.eval()")
    dtype = _dtype(deltas)
    normal = F.batch_norm(x.to(dtype), module.running_mean.to(dtype), module.running_var.to(dtype), eps=module.eps)
    return _affine(normal, deltas, (-1, *[1] * (x.ndim - 2)))


def _affine(normal: Tensor, deltas: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    out = normal * deltas["weight"].view(shape) if "weight" in deltas else torch.zeros_like(normal)
    return out + deltas["bias"].view(shape) if "bias" in deltas else out


def _convolution(module: nn.Conv2d, x: Tensor, deltas: Mapping[str, Tensor]) -> Tensor:
    weight = deltas.get("weight")
    if weight is None:
        weight = torch.zeros_like(module.weight, dtype=_dtype(deltas))
    out: Tensor = module._conv_forward(x.to(weight.dtype), weight, deltas.get("bias"))
    return out


_CONTRIBUTIONS: dict[type[nn.Module], _Contribution] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
}
