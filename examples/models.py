"""Small models without training, under the names that the documentation speaks of.

python examples/models.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def build(folder: Path) -> None:
    """Write them all."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        CLIPConfig,
        CLIPModel,
        LlamaConfig,
        LlamaForCausalLM,
        RobertaConfig,
        RobertaForMaskedLM,
        RobertaForSequenceClassification,
    )

    llama = LlamaConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    bases = _models(folder, ["base", "math", "code"], lambda: LlamaForCausalLM(llama))
    adapted = get_peft_model(bases, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "math-lora")

    sides: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    sides |= {"num_attention_heads": 2, "vocab_size": 60}
    roberta = RobertaConfig(**sides, max_position_embeddings=20)
    _models(folder, ["roberta-base"], lambda: RobertaForMaskedLM(roberta))
    for name, labels in (("cola", 2), ("mnli", 3)):
        config = RobertaConfig(**sides, max_position_embeddings=20, num_labels=labels)
        _models(folder, [name], lambda config=config: RobertaForSequenceClassification(config), tuned=True)

    vision = {key: value for key, value in sides.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}
    words = sides | {"bos_token_id": 0, "eos_token_id": 1}
    clip = CLIPConfig(text_config=words, vision_config=vision, projection_dim=12)
    _models(folder, ["clip", "cars", "sun397"], lambda: CLIPModel(clip))


def _models(folder: Path, names: list[str], make: Callable[[], Any], *, tuned: bool = False) -> Any:
    """A base, and copies of it with other weights; the base is returned. ``tuned``: the first is a copy, too."""
    torch.manual_seed(0)
    model = make()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i, name in enumerate(names):
        torch.manual_seed(sum(name.encode()) + i)  # other numbers for each model
        size = 0.02 if i or tuned else 0.0
        floats = {n: t for n, t in start.items() if t.is_floating_point()}
        model.load_state_dict(start | {n: t + size * torch.randn(t.shape) for n, t in floats.items()})
        model.save_pretrained(folder / name)
    model.load_state_dict(start)
    return model


if __name__ == "__main__":
    build(Path(sys.argv[1]))
