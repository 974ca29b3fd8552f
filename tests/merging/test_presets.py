"""Presets on the tensor names of the models they are for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import freemerge as fm
from freemerge.merging.recipe import PRESETS

WIDTH, HIDDEN, LAYERS = 24, 40, 2


def openclip(seed: int) -> dict[str, Tensor]:
    """A visual tower with OpenCLIP's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"visual.conv1.weight": (WIDTH, 3, 4, 4), "visual.proj": (WIDTH, 16)}
    for layer in range(LAYERS):
        block = f"visual.transformer.resblocks.{layer}"
        shapes |= {
            f"{block}.ln_1.weight": (WIDTH,),
            f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH),
            f"{block}.attn.in_proj_bias": (3 * WIDTH,),
            f"{block}.attn.out_proj.weight": (WIDTH, WIDTH),
            f"{block}.mlp.c_fc.weight": (HIDDEN, WIDTH),
            f"{block}.mlp.c_proj.weight": (WIDTH, HIDDEN),
        }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tower with the names of transformers' CLIPModel (the key map of docs/presets.md)."""
    names = {
        "visual.conv1.": "vision_model.embeddings.patch_embedding.",
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        ".attn.out_proj.": ".self_attn.out_proj.",
        ".mlp.c_fc.": ".mlp.fc1.",
        ".mlp.c_proj.": ".mlp.fc2.",
        ".ln_1.": ".layer_norm1.",
    }
    renamed = {}
    for name, tensor in weights.items():
        if name == "visual.proj":
            renamed["visual_projection.weight"] = tensor.T.contiguous()
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        if "in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part.clone()
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("kind", ["vit8", "vit30"])
def test_a_clip_in_two_layouts_merges_alike(kind: str) -> None:
    base, models = openclip(0), [openclip(seed) for seed in (1, 2, 3)]
    expected = to_transformers(fm.merge(base, models, fm.Recipe.preset(f"official-{kind}")))
    recipe = fm.Recipe.preset(f"official-{kind}-hf")
    merged = fm.merge(to_transformers(base), [to_transformers(model) for model in models], recipe)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        if not (kind == "vit8" and name.endswith("_proj.bias")):  # three separate biases are aligned one by one
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    layout_matters = fm.merge(
        to_transformers(base), [to_transformers(model) for model in models], recipe.replace(views=())
    )
    name = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    assert (layout_matters[name] - expected[name]).norm() > 0.1 * expected[name].norm()


def test_the_vit_presets_filter_what_the_script_filters() -> None:
    inspection = fm.inspect(openclip(0), [openclip(1)], fm.Recipe.preset("official-vit8"))
    filtered = {decision.name for decision in inspection.decisions if decision.action == "filter"}
    assert filtered == {
        f"visual.transformer.resblocks.{layer}.{name}"
        for layer in range(LAYERS)
        for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    }


def test_official_vit30_by_the_formula() -> None:
    base, models = openclip(0), [openclip(seed) for seed in (1, 2)]
    merged = fm.merge(base, models, fm.Recipe.preset("official-vit30"))
    name = "visual.transformer.resblocks.1.attn.in_proj_weight"
    mask = torch.from_numpy(fm.Official(0.7).mask(tuple(base[name].shape)))
    filtered = [torch.fft.ifft2(torch.fft.fft2((m[name] - base[name]).double()) * mask).real for m in models]
    torch.testing.assert_close(merged[name].double(), base[name].double() + 0.15 * sum(filtered), rtol=0, atol=1e-5)
    name = "visual.proj"
    plain = sum((m[name] - base[name]).double() for m in models)
    torch.testing.assert_close(merged[name].double(), base[name].double() + 0.15 * plain, rtol=0, atol=1e-5)


def test_the_roberta_preset_filters_every_matrix() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.RobertaModel(config, add_pooling_layer=False)
    weights = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    inspection = fm.inspect(weights, [weights], fm.Recipe.preset("official-roberta"))
    filtered = {decision.name for decision in inspection.decisions if decision.action == "filter"}
    assert filtered == {name for name, tensor in weights.items() if tensor.ndim == 2}
    assert "embeddings.word_embeddings.weight" in filtered


def test_every_preset_is_shipped_and_loads() -> None:
    assert set(PRESETS) >= {"paper", "official-vit8", "official-vit30", "official-roberta", "official-llm"}
    assert len({fm.Recipe.preset(name) for name in PRESETS}) == len(PRESETS)
    assert fm.Recipe.preset("official-llm").scale == pytest.approx(0.8 * 1.1)
    with pytest.raises(fm.ArgumentError, match="official-vit8"):
        fm.Recipe.preset("oficial-vit8")


def documented_views() -> dict[str, dict[str, list[str]]]:
    """The views that docs/presets.md recommends, by the model named in each line's comment."""
    text = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    lines = [line.split("#") for line in text.splitlines() if line.lstrip().startswith("- {stack") and "#" in line]
    return {comment.strip(): yaml.safe_load(view)[0] for view, comment in lines}


@pytest.mark.parametrize("family", ["RoBERTa", "Llama", "T5"])
def test_the_documented_views_fit_transformers_names(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    t5 = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = {
        "RoBERTa": lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(intermediate_size=24, **sizes)
        ),
        "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=24, **sizes)),
        "T5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
    }[family]()
    recipe = fm.Recipe.from_config({"views": [documented_views()[family]]})
    inspection = fm.inspect(model, [model], recipe)
    stacks = {decision.stacked_with for decision in inspection.decisions if decision.stacked_with}
    assert len(stacks) == (3 if family == "T5" else 1)
    assert all(len(stack) == 3 for stack in stacks)
