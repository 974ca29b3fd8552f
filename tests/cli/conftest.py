"""Models for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(40, 30, generator=generator), "a.bias": torch.randn(40, generator=generator)}
    paths = []
    for i in range(3):
        state = {n: t + 0.01 * i * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        paths.append(str(tmp_path / f"{'base' if i == 0 else f'model-{i}'}.safetensors"))
        save_file(state, paths[-1])
    return paths
