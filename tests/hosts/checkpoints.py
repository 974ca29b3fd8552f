"""Small checkpoints as mergekit reads them: a Llama and fine-tuned copies."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def write_models(folder: Path, count: int, dtype: torch.dtype = torch.float32) -> list[str]:
    """A base and ``count`` models in folders of their own, which have learnt something in common."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(count + 1)
    common = {name: 2 * torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in start.items()}
    paths = []
    for i in range(count + 1):
        generator = torch.Generator().manual_seed(i)
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator).to(dtype)
            tensor.copy_(start[name] + (0.01 * (i * noise + common[name]) if i else 0))
        paths.append(str(folder / ("base" if i == 0 else f"model-{i}")))
        model.save_pretrained(paths[-1])
    return paths
