"""Models and experts that benchmarks make for themselves, by the public API alone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import freemerge as fm

WIDTH = 1024
LAYER = {
    "attention.qkv.weight": (3 * WIDTH, WIDTH),
    "attention.out.weight": (WIDTH, WIDTH),
    "mlp.up.weight": (4 * WIDTH, WIDTH),
    "mlp.down.weight": (WIDTH, 4 * WIDTH),
    "norm.weight": (WIDTH,),
}


def shapes_of(megabytes: int) -> dict[str, tuple[int, ...]]:
    """Tensors of layers, so many megabytes in bfloat16."""
    layers = max(1, megabytes * 1_000_000 // (2 * sum(torch.Size(shape).numel() for shape in LAYER.values())))
    return {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()}


def write_models(folder: Path, count: int, shapes: dict[str, tuple[int, ...]]) -> list[Path]:
    """A base and fine-tuned models of it, ``count`` in all."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for index in range(count):
        state = {}
        for number, (name, shape) in enumerate(shapes.items()):
            base = 0.02 * torch.randn(shape, generator=generator.manual_seed(number))
            if index:
                base += 2e-3 * torch.randn(shape, generator=generator.manual_seed(index * 1_000_000 + number))
            state[name] = base.bfloat16()
        paths.append(folder / f"model-{index}.safetensors")
        save_file(state, paths[-1])
    return paths


def bank_of_experts(
    dtype: torch.dtype, device: str = "cpu", layers: int = 19, count: int = 8
) -> tuple[fm.ExpertBank, nn.Module]:
    """A model of layers of 5.3M parameters (19 make 100M) and one-percent experts for it."""
    model = nn.ModuleList(nn.Linear(2304, 2304) for _ in range(layers)).to(device, dtype)
    state = model.state_dict()
    tuned = {f"t{i}": {name: value + torch.randn_like(value) for name, value in state.items()} for i in range(count)}
    return fm.ExpertBank(model, fm.extract_experts(state, tuned)), model


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.attention_norm(x)
        heads = [layer(normal).unflatten(2, (6, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Encoder(nn.Sequential):
    """A transformer of 12M parameters, the size of small sentence encoders: token ids to class scores."""

    def __init__(self, width: int = 384, layers: int = 6) -> None:
        super().__init__(nn.Embedding(4000, width), *(Block(width) for _ in range(layers)), nn.Linear(width, 8))
