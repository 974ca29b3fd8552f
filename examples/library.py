"""A merge from one's own library: checkpoints that it reads itself, tensor by tensor, into memory that is there.

python examples/library.py base.safetensors math.safetensors code.safetensors merged.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import freemerge as fm


class File(Mapping[str, torch.Tensor]):
    """A safetensors file whose tensors are read when they are asked for."""

    def __init__(self, path: str) -> None:
        self._file = safe_open(path, framework="pt")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def merge(base: Mapping[str, torch.Tensor], models: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """FR-Merging with the weights of the whole model."""
    recipe = fm.Recipe(cutoff=0.3)
    weights = fm.task_weights(base, models, recipe)
    merged = {}
    for name, tensor in base.items():
        merged[name] = torch.empty_like(tensor)
        others = [model[name] for model in models]
        fm.merge_tensors(tensor, others, recipe=recipe, weights=weights, name=name, out=merged[name])
    return merged


if __name__ == "__main__":
    base, *models, out = sys.argv[1:]
    save_file(merge(File(base), [File(path) for path in models]), out)
    print(f"{len(models)} models merged into {out}")
