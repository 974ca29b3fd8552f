"""Small state dicts, for hosts that need no architecture."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

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
