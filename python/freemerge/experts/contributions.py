"""What changes of a module's parameters add to its output, by the kinds of modules that are served."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Product:
    """A change of a matrix as two factors, [H, r] and [r, W], on its device."""

    left: Tensor
    right: Tensor

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.left @ (self.right @ x)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.left[rows] @ self.right


class Contribution(ABC):
    """What changes of a module's parameters add to its output for some samples.

    All modules served are linear in their weight and bias: it is the module's output with the changes for parameters.
    """

    def __init__(self, module: Any, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        self.module = module
        self.x = self.prepared(x, dtype)
        self.total = torch.zeros(shape, dtype=dtype, device=x.device)

    def add(self, weights: Tensor, deltas: Mapping[str, Any]) -> None:
        """Add one expert's part: its weight for each sample, and its changes of the parameters."""
        self.total.addcmul_(self.output(deltas), weights.view(-1, *[1] * (self.total.ndim - 1)))

    def result(self) -> Tensor:
        """The sum, in the shape of the module's output."""
        return self.total

    @abstractmethod
    def prepared(self, x: Tensor, dtype: torch.dtype) -> Any:
        """What all experts need of the input."""

    @abstractmethod
    def output(self, deltas: Mapping[str, Any]) -> Tensor:
        """The module's output for the prepared input with these parameters."""


class _Linear(Contribution):
    """The input's vectors are columns, because a sparse product reads and writes rows of contiguous memory."""

    def __init__(self, module: nn.Linear, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__(module, x, torch.Size((module.out_features, x.numel() // module.in_features)), dtype)
        self._shape = shape
        self._bias = torch.zeros(shape[0], module.out_features, dtype=dtype, device=x.device)

    def prepared(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.reshape(-1, self.module.in_features).to(dtype).t().contiguous()

    def add(self, weights: Tensor, deltas: Mapping[str, Any]) -> None:
        if "weight" in deltas:
            columns = weights[:, None].expand(-1, self.total.shape[1] // len(weights)).reshape(-1)
            self.total.addcmul_(self.output(deltas), columns)
        if "bias" in deltas:
            self._bias.addcmul_(weights[:, None], deltas["bias"])

    def output(self, deltas: Mapping[str, Any]) -> Tensor:
        product: Tensor = deltas["weight"] @ self.x
        return product

    def result(self) -> Tensor:
        samples, *between, width = self._shape
        bias = self._bias.view(samples, *[1] * len(between), width)
        return self.total.t().contiguous().view(self._shape).add_(bias)


class _Embedding(Contribution):
    def prepared(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        used, place = torch.unique(x, return_inverse=True)
        return used, place

    def output(self, deltas: Mapping[str, Any]) -> Tensor:
        used, place = self.x
        if isinstance(deltas["weight"], Product) or not deltas["weight"].is_sparse:
            rows: Tensor = deltas["weight"][used]
            return rows[place]
        entry_rows, columns = deltas["weight"].indices()
        values = deltas["weight"].values()
        starts, ends = torch.searchsorted(entry_rows, used), torch.searchsorted(entry_rows, used, right=True)
        lengths = ends - starts
        row = torch.repeat_interleave(torch.arange(len(used), device=used.device), lengths)
        entry = torch.arange(len(row), device=used.device) + (starts - lengths.cumsum(0) + lengths)[row]
        dense = torch.zeros(len(used), self.module.embedding_dim, dtype=values.dtype, device=used.device)
        dense[row, columns[entry]] = values[entry]
        return dense[place]


class _Norm(Contribution):
    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """What makes the parameters broadcast over the output."""
        return (-1, *[1] * (self.total.ndim - 2))

    def output(self, deltas: Mapping[str, Any]) -> Tensor:
        out = torch.zeros_like(self.total)
        if "weight" in deltas:
            out = self.x * deltas["weight"].view(self.parameter_shape)
        return out + deltas["bias"].view(self.parameter_shape) if "bias" in deltas else out


class _LayerNorm(_Norm):
    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return tuple(self.module.normalized_shape)

    def prepared(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.layer_norm(x.to(dtype), self.module.normalized_shape, None, None, self.module.eps)


class _GroupNorm(_Norm):
    def prepared(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.group_norm(x.to(dtype), self.module.num_groups, None, None, self.module.eps)


class _BatchNorm(_Norm):
    def prepared(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        mean, variance = self.module.running_mean.to(dtype), self.module.running_var.to(dtype)
        return F.batch_norm(x.to(dtype), mean, variance, eps=self.module.eps)


class _Convolution(Contribution):
    def prepared(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    def output(self, deltas: Mapping[str, Any]) -> Tensor:
        weight = deltas["weight"] if "weight" in deltas else torch.zeros_like(self.module.weight, dtype=self.x.dtype)
        out: Tensor = self.module._conv_forward(self.x, weight, deltas.get("bias"))
        return out


SERVED = ("weight", "bias", "running_mean", "running_var")
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_KINDS: dict[type[nn.Module], type[Contribution]] = {
    nn.Linear: _Linear,
    nn.Embedding: _Embedding,
    nn.LayerNorm: _LayerNorm,
    nn.GroupNorm: _GroupNorm,
    **dict.fromkeys(BATCH_NORMS, _BatchNorm),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _Convolution),
}


def contribution_of(module: nn.Module) -> type[Contribution] | None:
    """What serves a module; None for one that computes otherwise than those that are known."""
    own = vars(module)
    replaced = own.get("_old_forward", own.get("forward"))  # accelerate keeps the one that it wraps
    forward = type(module).forward if replaced is None else getattr(replaced, "__func__", replaced)
    for kind, contribution in _KINDS.items():
        if isinstance(module, kind) and forward is kind.forward:
            return contribution
    return None
