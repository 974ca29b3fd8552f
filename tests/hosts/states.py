"""Small state dicts, for hosts that need no architecture; and what the engine makes of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm

SHAPES = {"embed.weight": (30, 16), "0.weight": (24, 16), "0.bias": (24,), "1.weight": (9, 24), "norm.weight": (9,)}


def write_states(folder: Path, count: int) -> list[Path]:
    """A base and ``count`` models of it, as safetensors files."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    paths = []
    for i in range(count + 1):
        noise = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        paths.append(folder / ("base.safetensors" if i == 0 else f"model-{i}.safetensors"))
        save_file({name: tensor + (0.01 * i * noise[name] if i else 0) for name, tensor in base.items()}, paths[-1])
    return paths


def tensors_of(model: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a folder of them."""
    found: dict[str, Tensor] = {}
    for file in sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else [model]:
        found |= load_file(file)
    assert found
    return found


def assert_equal_to_the_engine(
    found: Mapping[str, Tensor],
    models: Sequence[str | Path],
    recipe: fm.Recipe,
    weights: Sequence[float] | None = None,
) -> None:
    """What a host merged of a base and models is what the engine merges, tensor by tensor, and not the base."""
    base, *others = map(tensors_of, models)
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        expected = fm.merge_tensors(tensor, [m[name] for m in others], recipe=recipe, weights=weights, name=name)
        assert torch.equal(found[name], expected), name
        assert not torch.equal(found[name], tensor), name
