"""Weights of single layers, against merges of their tensors alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm
from freemerge.merging.selection import LayerWeights

SHAPES = {
    "h.0.w": (9, 7),
    "h.0.b": (9,),
    "h.1.w": (7, 9),
    "h.1.b": (7,),
    "h.10.b": (3,),
    "norm": (7,),
    "running_mean": (3,),
}
LAYERS = [("h.1.*", (0.7, -0.2)), ("*.b", (0.0, 1.0)), ("h.*", (9.0, 9.0))]
OWN = {"h.1.w": (0.7, -0.2), "h.1.b": (0.7, -0.2), "h.0.b": (0.0, 1.0), "h.10.b": (0.0, 1.0), "h.0.w": (9.0, 9.0)}
METHODS = [
    fm.Recipe(method="average", weights=(0.5, 0.25)),
    fm.Recipe(method="task_arithmetic", weights=(0.5, 0.25), scale=0.8),
    fm.Recipe(method="dare", weights=(0.5, 0.25), drop=0.5),
    fm.Recipe(method="dare", weights=(0.5, 0.25), drop=0.5, sign_election=True),
    fm.Recipe(method="ties", weights=(0.5, 0.25), scope="tensor", density=0.5),
    fm.Recipe(method="breadcrumbs", weights=(0.5, 0.25), beta=0.4, gamma=0.1),
    fm.Recipe(weights=(0.5, 0.25)),
    fm.Recipe(weights=(0.5, 0.25), sign_election=True, align=True, renormalize=None),
]


@pytest.fixture
def states() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()} for _ in range(3)]


@pytest.mark.parametrize("recipe", METHODS)
def test_a_tensor_has_the_weights_of_its_layer(
    states: list[dict[str, Tensor]], recipe: fm.Recipe, tmp_path: Path
) -> None:
    base, *models = states
    layered = recipe.replace(layers=LAYERS)
    merged = fm.merge(base, models, layered)
    for name in SHAPES:
        own = recipe.replace(weights=OWN.get(name, recipe.weights))
        expected = fm.merge({name: base[name]}, [{name: model[name]} for model in models], own)[name]
        assert torch.equal(merged[name], expected), name
        tensors = [model[name] for model in models]
        assert torch.equal(fm.merge_tensors(base[name], tensors, recipe=layered, name=name), expected), name
    for i, state in enumerate(states):
        save_file(state, tmp_path / f"{i}.safetensors")
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    fm.merge_checkpoints(files[0], files[1:], tmp_path / "out", layered, progress=False)
    assert all(
        torch.equal(tensor, merged[name]) for name, tensor in load_file(tmp_path / "out/model.safetensors").items()
    )


def test_a_recipe_with_layers_is_written_and_read(tmp_path: Path) -> None:
    recipe = METHODS[1].replace(layers=LAYERS)
    assert recipe.layers[0] == LayerWeights("h.1.*", (0.7, -0.2))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert fm.Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert "layers" not in METHODS[1].to_config()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([("h.7.*", (1, 1))], "'h.7.\\*' matches no tensor"),
        ([("h.0.*", (1, 1, 1))], "has 3 weights, the method 2"),
        ([("h.0.*", "ab")], "finite numbers"),
        ([("h.0.*", (1, float("nan")))], "finite numbers"),
        ([(3, (1, 1))], "pattern must be a string"),
        (["h.0.*"], "expected {pattern: ..., weights: ...}"),
        ("h.0.*", "layers must be a list"),
    ],
)
def test_layers_that_make_no_sense_are_refused(states: list[dict[str, Tensor]], layers: object, message: str) -> None:
    base, *models = states
    with pytest.raises(fm.ArgumentError, match=message):
        fm.merge(base, models, METHODS[0].replace(layers=layers))


def test_layers_need_numbers_and_one_weight_for_what_is_stacked(states: list[dict[str, Tensor]]) -> None:
    for recipe in (fm.Recipe(), fm.Recipe(method="iso_c"), fm.Recipe(method="task_arithmetic")):
        with pytest.raises(fm.ArgumentError, match=f"layers: method {recipe.method.name} needs weights as numbers"):
            recipe.replace(layers=LAYERS)
    square = [{name: torch.ones(4, 4) for name in ("q.w", "k.w")} for _ in states]
    stacked = METHODS[6].replace(views=[{"stack": ["q.*", "k.*"]}], layers=[("q.*", (1, 1))])
    with pytest.raises(fm.ArgumentError, match="stacked with tensors that have other weights"):
        fm.merge(square[0], square[1:], stacked)
