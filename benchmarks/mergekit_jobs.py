"""The same merges by mergekit 0.1.5, for ``benchmarks.engine --mergekit PYTHON``, which runs this in that environment.

Its models are directories with a config.json; here they are links to the files that the other jobs read. Arithmetic is
in bfloat16, as its users set it, but for the filter, which torch.fft has in float32 only.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import freemerge as fm
from benchmarks import harness
from freemerge.checkpoint import Checkpoint

FILTERED = "filtered_task_arithmetic"
SCALE = 0.4  # of the sum of the task vectors, as it is by default for four models in freemerge
# What mergekit is asked for, by the names of the jobs; the second number is the parameter of every model.
METHODS: dict[str, tuple[str, dict[str, float]]] = {
    "mergekit linear": ("linear", {"weight": 0.25}),
    "mergekit task_arithmetic": ("task_arithmetic", {"weight": SCALE}),
    "mergekit task_arithmetic with torch.fft": (FILTERED, {"weight": SCALE}),
    "mergekit ties": ("ties", {"weight": 1.0, "density": 0.2}),
    "mergekit dare_linear": ("dare_linear", {"weight": SCALE, "density": 0.1}),
    "mergekit dare_ties": ("dare_ties", {"weight": SCALE, "density": 0.1}),
}


def prepare(folder: Path, files: list[Path]) -> list[Path]:
    """A directory of a Llama model for each file."""
    paths = []
    for file in files:
        path = folder / f"llama-{file.stem}"
        path.mkdir()
        os.link(file, path / "model.safetensors")
        shapes = {name: spec.shape for name, spec in Checkpoint.open(file).specs.items()}
        vocabulary, width = shapes["model.embed_tokens.weight"]
        head = 64
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
            "vocab_size": vocabulary, "hidden_size": width, "head_dim": head, "num_attention_heads": width // head,
            "num_hidden_layers": sum(name.endswith("input_layernorm.weight") for name in shapes),
            "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
            "num_key_value_heads": shapes["model.layers.0.self_attn.k_proj.weight"][0] // head,
            "tie_word_embeddings": False,
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


def merge(folder: Path, out: Path, job: str) -> None:
    """Merge the directories of :func:`prepare`; call :func:`load` before the clock starts."""
    config, run_merge, options = load(folder, job)
    run_merge(config, str(out), options=options)


@cache
def load(folder: Path, job: str) -> tuple[Any, Any, Any]:
    """mergekit's configuration, function and options for a job; the imports are most of the time."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    _register()
    method, parameters = METHODS[job]
    base, *models = (str(path) for path in sorted(folder.glob("llama-*")))
    content: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": model, "parameters": parameters} for model in models],
        "dtype": "bfloat16",
    }
    if method != "linear":
        content["base_model"] = base
    return MergeConfiguration.model_validate(content), run_merge, MergeOptions(copy_tokenizer=False, quiet=True)


def _register() -> None:
    """Task arithmetic whose merged task vector is filtered as freemerge's default filters it."""
    from mergekit.merge_methods import BasePolicy, InputContract, PerNonBase, TensorGroup, merge_method, register

    def filtered(group, weight):  # type: ignore[no-untyped-def]  # mergekit reads the annotations that follow
        return add_filtered(
            group.base.tensor, [entry.tensor for entry in group.non_base], weight.values_for(group.non_base)
        )

    filtered.__annotations__ = {"group": TensorGroup, "weight": PerNonBase[float], "return": Tensor}
    register(merge_method(filtered, name=FILTERED, contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1)))


def add_filtered(base: Tensor, models: list[Tensor], weights: list[float]) -> Tensor:
    """``base + sum_i weights[i] * (models[i] - base)``, of matrices filtered by torch.fft to the same norm."""
    total = torch.zeros(base.shape)
    for model, weight in zip(models, weights, strict=True):
        total.add_(model - base, alpha=weight)
    if base.ndim == 2:
        norm = total.norm()
        total = _filter(*base.shape)(total)
        total.mul_(norm / total.norm())
    return (base + total).to(base.dtype)


@cache
def _filter(height: int, width: int) -> Any:
    return harness.torch_fft(torch.empty(height, width), fm.Recipe().response, in_place=True)
