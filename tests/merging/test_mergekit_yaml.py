"""Configurations of mergekit: what they mean here, and what is refused. tests/hosts compares with mergekit itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import freemerge as fm
from freemerge.cli import main
from freemerge.merging.mergekit_yaml import read_mergekit
from freemerge.merging.selection import rule_of

CONFIG: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [
        {"model": "base"},
        {"model": "math", "parameters": {"weight": 0.5}},
        {"model": "code", "parameters": {"weight": 0.25}},
    ],
    "parameters": {"lambda": 0.8},
    "dtype": "bfloat16",
}


def read(tmp_path: Path, config: Any) -> tuple[str, list[str], fm.Recipe]:
    path = tmp_path / "config.yml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return read_mergekit(path)


def test_task_arithmetic(tmp_path: Path) -> None:
    base, models, recipe = read(tmp_path, CONFIG)
    assert (base, models) == ("base", ["math", "code"])
    assert recipe == fm.Recipe(method="task_arithmetic", weights=[0.5, 0.25], scale=0.8, out_dtype="bfloat16")
    normalized = read(tmp_path, CONFIG | {"parameters": {"normalize": True}})[2]
    assert normalized.weights == pytest.approx([2 / 3, 1 / 3])


def test_null_is_as_not_stated(tmp_path: Path) -> None:
    assert read(tmp_path, CONFIG | dict.fromkeys(["out_dtype", "tokenizer_source", "slices"])) == read(tmp_path, CONFIG)
    assert read(tmp_path, CONFIG | {"out_dtype": "float16"})[2].out_dtype == "float16"


def test_an_exponent_makes_a_number(tmp_path: Path) -> None:
    text = yaml.safe_dump(CONFIG).replace("0.25", "25e-2")
    assert "25e-2" in text
    assert read(tmp_path, text)[2].weights == (0.5, 0.25)


def test_linear_keeps_the_share_of_the_base(tmp_path: Path) -> None:
    config = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": w}} for name, w in (("a", 1.0), ("b", 2.0), ("c", 1.0))],
    }
    base, models, recipe = read(tmp_path, config)
    assert (base, models) == ("a", ["b", "c"])
    assert recipe.weights == (0.5, 0.25)
    assert recipe.scale == 1.0
    base, models, recipe = read(tmp_path, config | {"base_model": "b", "out_dtype": "float16"})
    assert (base, models) == ("b", ["a", "c"])
    assert recipe.weights == (0.25, 0.25)
    assert recipe.out_dtype == "float16"
    with pytest.raises(fm.ArgumentError, match="linear counts it as a model"):
        read(tmp_path, config | {"base_model": "z"})


def test_ties(tmp_path: Path) -> None:
    config = CONFIG | {"merge_method": "ties", "parameters": {"density": 0.3, "int8_mask": True}}
    config["models"] = [{"model": m, "parameters": {"weight": 0.5}} for m in ("math", "code")]
    assert read(tmp_path, config)[2] == fm.Recipe(
        method="ties", density=0.3, scope="tensor", scale=1.0, out_dtype="bfloat16"
    )
    config["models"] = CONFIG["models"]
    assert read(tmp_path, config)[2].weights == (0.5, 0.25)


@pytest.mark.parametrize(
    ("given", "beta", "gamma"),
    [
        ({"density": 0.5, "gamma": 0.1}, 0.4, 0.1),
        ({"density": 0.75, "gamma": 0.5}, 0.0, 0.25),
        ({"density": 0.5}, 0.49, 0.01),
        ({}, 0.0, 0.0),
    ],
)
def test_breadcrumbs(given: dict[str, float], beta: float, gamma: float, tmp_path: Path) -> None:
    recipe = read(tmp_path, CONFIG | {"merge_method": "breadcrumbs", "parameters": given | {"lambda": 0.5}})[2]
    assert recipe.weights == (0.5, 0.25)
    assert (recipe.beta, recipe.gamma, recipe.scale) == pytest.approx((beta, gamma, 0.5))
    normalized = read(tmp_path, CONFIG | {"merge_method": "breadcrumbs", "parameters": given | {"normalize": True}})[2]
    assert normalized.weights == pytest.approx((2 / 3, 1 / 3))


def test_model_stock(tmp_path: Path) -> None:
    config = {**CONFIG, "merge_method": "model_stock", "models": [{"model": name} for name in ("base", "math", "code")]}
    config["parameters"] = {"filter_wise": False}
    assert read(tmp_path, config) == (
        "base",
        ["math", "code"],
        fm.Recipe(method="model_stock", scale=1.0, out_dtype="bfloat16"),
    )


def weights_of(recipe: fm.Recipe, name: str) -> tuple[float, ...]:
    """As the engine finds them, after a round trip through a file."""
    recipe = fm.Recipe.from_config(yaml.safe_load(recipe.to_yaml()))
    layer = rule_of([name], recipe.layers)
    return recipe.weights if layer is None else layer.weights  # type: ignore[no-any-return]


def saved(path: Path, names: list[str]) -> str:
    save_file({name: torch.zeros(2) for name in names}, path)
    return str(path)


def test_weights_by_name(tmp_path: Path) -> None:
    parts = [{"filter": "mlp", "value": 0.5}, {"filter": "*", "value": 0.25}, {"value": 9.0}]
    models = [{"model": "math", "parameters": {"weight": parts}}, {"model": "code"}]
    mlp, attention, both, norm = (f"layers.0.{part}.weight" for part in ("mlp", "attn", "mlp.attn", "norm[1]"))
    config = CONFIG | {"models": models, "parameters": {"weight": [{"filter": "attn", "value": 2}, {"value": 1}]}}
    config["base_model"] = saved(tmp_path / "base.safetensors", [mlp, attention, both, norm])
    recipe = read(tmp_path, config)[2]
    found = {name: weights_of(recipe, name) for name in (mlp, attention, both, norm)}
    assert found == {mlp: (0.5, 1.0), attention: (0.25, 2.0), both: (0.5, 2.0), norm: (0.25, 1.0)}
    recipe = read(tmp_path, config | {"parameters": {"weight": 1.0, "normalize": True}})[2]
    assert weights_of(recipe, mlp) == pytest.approx((1 / 3, 2 / 3))
    models = [{"model": "math", "parameters": {"weight": {"filter": "mlp", "value": 1.0}}}]
    with pytest.raises(fm.ArgumentError, match=r"weight: no value is given for layers\.0\.attn\.weight"):
        read(tmp_path, config | {"models": models, "parameters": {}})


def test_a_base_that_weights_by_name_have_nothing_to_go_by(tmp_path: Path) -> None:
    weight = [{"filter": "mlp", "value": 3.0}, {"value": 0.5}]
    config = CONFIG | {"models": [{"model": "math", "parameters": {"weight": weight}}]}
    with pytest.raises(fm.CheckpointError, match="nowhere"):
        read(tmp_path, config | {"base_model": str(tmp_path / "nowhere")})
    save_file({"steps": torch.tensor([1])}, tmp_path / "base.safetensors")
    with pytest.raises(fm.ArgumentError, match=r"base_model: .* holds no tensor to merge"):
        read(tmp_path, config | {"base_model": str(tmp_path / "base.safetensors")})


def test_a_filter_that_fits_no_tensor_is_passed_over(tmp_path: Path) -> None:
    weight = [{"filter": "lm_head", "value": 3.0}, {"value": 0.5}]
    base = saved(tmp_path / "base.safetensors", ["mlp.weight"])
    config = CONFIG | {"base_model": base, "models": [{"model": "math", "parameters": {"weight": weight}}]}
    recipe = read(tmp_path, config)[2]
    assert recipe.weights == (0.5,)
    assert recipe.layers == ()


@pytest.mark.parametrize("where", [{"num_hidden_layers": 5}, {"text_config": {"num_hidden_layers": 5}}])
def test_a_list_of_numbers_is_a_gradient_over_the_layers(where: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(where))
    mlp = [f"model.layers.{layer}.mlp.weight" for layer in range(5)]
    attention = [f"model.layers.{layer}.attn.3.weight" for layer in range(5)]  # the second number is not a layer's
    saved(tmp_path / "base" / "model.safetensors", [*mlp, *attention, "embed.weight"])
    weights: list[Any] = [[0.0, 1.0, 0.0], [{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 0.5}]]
    listed = [{"model": name, "parameters": {"weight": w}} for name, w in zip("ab", weights, strict=True)]
    config = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": listed}
    recipe = read(tmp_path, config)[2]
    for layer, (first, second) in enumerate([(0.0, 0.2), (0.5, 0.3), (1.0, 0.4), (0.5, 0.5), (0.0, 0.6)]):
        assert weights_of(recipe, mlp[layer]) == pytest.approx((first, second))
        assert weights_of(recipe, attention[layer]) == pytest.approx((first, 0.5))
    assert weights_of(recipe, "embed.weight") == (0.0, 0.5), "the beginning, for tensors of no layer"
    saved(tmp_path / "base" / "model.safetensors", ["model.layers.5.mlp.weight"])
    with pytest.raises(fm.ArgumentError, match="lies beyond the 5 layers"):
        read(tmp_path, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"merge_method": "dare_ties"},
            r"merge_method: 'dare_ties' is not computed here as mergekit does \(what it drops",
        ),
        ({"merge_method": "dare_linear"}, "sum of magnitudes of the rest instead of the expected value"),
        ({"merge_method": "slerp"}, "no sum of task vectors.*freemerge mergekit-yaml runs it in mergekit"),
        ({"merge_method": ["ties"]}, "merge_method"),
        ({"merge_method": "passthrough"}, "merge_method"),
        ({"slices": []}, "slices: layers cannot"),
        ({"modules": {}}, "modules"),
        ({"tokenizer": {}}, "tokenizer: vocabularies"),
        ({"tokenizer_source": "union"}, "tokenizer_source: 'union'"),
        ({"chat_template": "auto"}, "chat_template"),
        ({"mdels": []}, "mdels: unknown"),
        ({"base_model": None}, "base_model: task_arithmetic needs it"),
        ({"base_model": {"path": "a", "revision": "b"}}, "model: must be a path"),
        ({"base_model": "org/base@main"}, "names a revision"),
        ({"models": "base"}, "models: must be a list"),
        ({"models": [{"model": "base"}]}, "models: none but the base"),
        ({"models": [{"model": "math"}]}, "weight: math has none"),
        ({"models": [{"model": "math+lora", "parameters": {"weight": 1}}]}, "names an adapter"),
        ({"models": [{"model": "math", "parameters": {"weight": [0.1, 0.5]}}]}, "the number of layers, for gradients"),
        ({"models": [{"model": "math", "parameters": {"weight": [0.1, {"value": 1}]}}]}, "weight: must be a number, a"),
        ({"merge_method": "ties", "parameters": {"density": [0.1, 0.5]}}, "density: one number"),
        ({"models": [{"model": "math", "parameters": {"weight": "high"}}]}, "weight: must be a number"),
        ({"parameters": {"densty": 1}}, "parameters: densty is not known for task_arithmetic"),
        ({"parameters": {"lambda": "x"}}, "lambda: must be a number"),
        ({"parameters": {"normalize": 1}}, "normalize: must be true or false"),
        ({"merge_method": "linear", "parameters": {"normalize": False}}, "normalize: linear without it"),
        ({"merge_method": "ties", "models": [{"model": "m", "parameters": {"weight": 0}}]}, "weight: ties has none"),
        ({"merge_method": "ties", "models": [{"model": "m", "parameters": {"weight": -1}}]}, "weight: ties has none"),
        ({"merge_method": "breadcrumbs", "parameters": {"rescale": True}}, "rescale: breadcrumbs"),
        ({"merge_method": "breadcrumbs", "parameters": {"density": 1.5}}, "density must|gamma must|beta must"),
        ({"merge_method": "model_stock"}, "parameters: weight is not known for model_stock"),
        ({"merge_method": "model_stock", "parameters": {"filter_wise": True}}, "filter_wise: a ratio"),
        ({"merge_method": "ties", "parameters": {"rescale": True}}, "rescale"),
        ({"merge_method": "ties", "parameters": {"normalize": False}}, "normalize"),
        ({"dtype": "int8"}, "out_dtype must be"),
        ({"models": [{"model": "math", "density": 0.1, "parameters": {"weight": 1}}]}, "models: density: unknown here"),
        ({"models": [{"model": "math", "revision": "abc"}]}, "models: revision: unknown here"),
        (
            {"models": [{"model": "math", "parameters": {"weight": 1, "lambda": 9}}]},
            "parameters: lambda is of all models in task_arithmetic, not of one alone",
        ),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(fm.ArgumentError, match=rf"config\.yml: .*{message}"):
        read(tmp_path, {**CONFIG, **change})


def test_no_configuration(tmp_path: Path) -> None:
    for text in ("[1]", "a: [", "a: 1\na: 2", ""):
        with pytest.raises(fm.ArgumentError, match=r"config\.yml"):
            read(tmp_path, text)
    with pytest.raises(fm.ArgumentError, match="No such file"):
        read_mergekit(tmp_path / "nothing.yml")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"mlp.weight": torch.randn(6, 4, generator=generator), "head.weight": torch.randn(3, 4)}
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "b")]
    for i, path in enumerate(paths):
        save_file({name: tensor + i for name, tensor in tensors.items()}, path)
    weight = [{"filter": "mlp", "value": 0.5}, {"value": 0.25}]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": paths[0],
        "models": [{"model": path, "parameters": {"weight": weight}} for path in paths[1:]],
    }
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(config))
    out = tmp_path / "out.safetensors"
    assert main(["merge", "--mergekit", str(file), "-o", str(out)]) == 0
    merged = load_file(out)
    torch.testing.assert_close(merged["mlp.weight"], tensors["mlp.weight"] + 0.5 * 3)
    torch.testing.assert_close(merged["head.weight"], tensors["head.weight"] + 0.25 * 3)
    assert main(["inspect", "--mergekit", str(file)]) == 0
    capsys.readouterr()
    assert main(["init", "--mergekit", str(file), "-o", str(tmp_path / "recipe.yml")]) == 0
    again = tmp_path / "again.safetensors"
    assert main(["merge", *paths, "--recipe", str(tmp_path / "recipe.yml"), "-o", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()
    assert main(["merge", "--mergekit", str(file), "-o", str(tmp_path / "folder")]) == 0
    written = json.loads((tmp_path / "folder" / "freemerge.json").read_text())["recipe"]
    assert fm.Recipe.from_config({k: v for k, v in written.items() if k != "measured"}) == read_mergekit(file)[2]
    capsys.readouterr()
    assert main(["merge", "--mergekit", str(file), "-o", str(again), "--scale", "auto", "--force"]) == 0
    assert torch.equal(load_file(again)["mlp.weight"], merged["mlp.weight"]), "numbers as weights are taken as they are"
    capsys.readouterr()
    assert main(["merge", "--mergekit", str(file), "-o", str(again), "--weights", "5,7", "--force"]) == 2
    assert "--weights: the configuration has weights by the tensors' names" in capsys.readouterr().err
    assert main(["merge", *paths, "--mergekit", str(file), "-o", str(out)]) == 2
    assert "--mergekit names base and models" in capsys.readouterr().err
    assert main(["merge", "-o", str(out)]) == 2
    assert "BASE and at least one MODEL are required" in capsys.readouterr().err
