"""Language models that transformers 5 keeps otherwise in memory than in files: stacked, fused and renamed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "Qwen3Moe": SMALL | HEADS | EXPERTS | {"head_dim": 16},
    "Qwen2Moe": SMALL | HEADS | EXPERTS | {"shared_expert_intermediate_size": 24},
    "Mixtral": SMALL | HEADS | {"num_local_experts": 3},
    "Olmoe": SMALL | HEADS | {"num_experts": 3},
    "Phimoe": SMALL | HEADS | {"num_local_experts": 3},
    "MiniMax": SMALL | HEADS | {"num_local_experts": 3},
    "GPTNeoX": SMALL | {"num_attention_heads": 2},
    "GptOss": SMALL | HEADS | {"num_local_experts": 3, "head_dim": 16},
    "GraniteMoe": SMALL | HEADS | {"num_local_experts": 3},
    "Llama": SMALL | HEADS,
}


def build(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model
