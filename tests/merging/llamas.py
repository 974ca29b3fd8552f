"""Small Llamas in bfloat16, sharded on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from freemerge.checkpoint import Checkpoint


def llama(folder: Path, seed: int, strength: float, shard: str, *, mean: float = 0.0, **options: Any) -> Path:
    """The base, for seed 0, or one that has learnt something, in shards of a size; ``options`` are of LlamaConfig."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**layers, **options))
    generator = torch.Generator().manual_seed(seed)
    if seed:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(strength * (torch.randn(parameter.shape, generator=generator) + mean))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model."""
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.read(name).clone() for name in checkpoint.specs}
