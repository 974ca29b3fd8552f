"""Writing a merged model into a module that is there already."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..checkpoint.finite import stays_finite
from ..checkpoint.state_dict import dense_tensors, tied_names
from ..dense import overwrite
from ..errors import ArgumentError, CheckpointError
from ..overlap import internal_overlap


class Target:
    """The tensors of a module's state dict, which a merged model with these names and shapes is written into.

    Raises ArgumentError for what is no module, CheckpointError, naming the tensor, if one has no memory of its own, or
    none for each of its entries.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise ArgumentError(f"into must be a module, got {type(module).__name__}")
        self._tensors = dense_tensors("into", module.state_dict(keep_vars=True))
        for name, tensor in self._tensors.items():
            if internal_overlap(tensor.shape, tensor.stride()):
                raise CheckpointError(f"into: tensor {name!r} may overlap itself in memory (strides {tensor.stride()})")
        self._tied = tied_names(self._tensors)

    def fill(self, merged: Mapping[str, Tensor]) -> None:
        """Copy all tensors, rounded to the module's dtypes; CheckpointError, and no copy, where one does not fit."""
        for name, tensor in merged.items():
            held = self._tensors.get(name)
            if held is None or held.shape != tensor.shape:
                has = "lacks it" if held is None else f"has shape {tuple(held.shape)}"
                raise CheckpointError(f"into: the merged model has {name!r} {tuple(tensor.shape)}, the module {has}")
        for name, tensor in merged.items():
            dtype = self._tensors[name].dtype
            if dtype != tensor.dtype and not _fits(tensor, tensor.to(dtype)):
                raise CheckpointError(f"into: the merged {name!r} does not fit into {dtype} of the module")
        for name in self._tensors:
            if name not in merged and self._tied.get(name) not in merged:
                raise CheckpointError(f"into: the module has {name!r}, which the merged model lacks")
        for name, first in self._tied.items():
            if name in merged and first in merged:
                one, other = (merged[n].to(self._tensors[first]) for n in (name, first))
                if not torch.equal(one, other):  # as where a model has a head of its own
                    raise CheckpointError(f"into: the module ties {name!r} to {first!r}, the merged model does not")
        for name, tensor in merged.items():
            overwrite(self._tensors[name], tensor)


def _fits(tensor: Tensor, held: Tensor) -> bool:
    """Whether another dtype holds a tensor: floats are rounded, integers are not, nor is one made of the other."""
    if tensor.is_floating_point() and held.is_floating_point():
        return stays_finite(tensor, held)
    return torch.equal(held.to(tensor.dtype), tensor)
