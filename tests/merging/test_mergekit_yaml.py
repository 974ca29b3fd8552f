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


def test_weights_by_name(tmp_path: Path) -> None:
    parts = [{"filter": "mlp", "value": 0.5}, {"filter": "*", "value": 0.25}, {"value": 9.0}]
    models = [{"model": "math", "parameters": {"weight": parts}}, {"model": "code"}]
    config = CONFIG | {"models": models, "parameters": {"weight": [{"filter": "attn", "value": 2}, {"value": 1}]}}
    method: Any = read(tmp_path, config)[2].method
    assert method.weights_of("layers.0.mlp.weight") == (0.5, 1.0)
    assert method.weights_of("layers.0.attn.weight") == (0.25, 2.0)
    method = read(tmp_path, config | {"parameters": {"weight": 1.0, "normalize": True}})[2].method
    assert method.weights_of("layers.0.mlp.weight") == pytest.approx((1 / 3, 2 / 3))


@pytest.mark.parametrize("where", [{"num_hidden_layers": 5}, {"text_config": {"num_hidden_layers": 5}}])
def test_a_list_of_numbers_is_a_gradient_over_the_layers(where: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(where))
    weights: list[Any] = [[0.0, 1.0, 0.0], [{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 0.5}]]
    listed = [{"model": name, "parameters": {"weight": w}} for name, w in zip("ab", weights, strict=True)]
    config = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": listed}
    method = read(tmp_path, config)[2].method
    for layer, (first, second) in enumerate([(0.0, 0.2), (0.5, 0.3), (1.0, 0.4), (0.5, 0.5), (0.0, 0.6)]):
        assert method.weights_of(f"model.layers.{layer}.mlp.weight") == pytest.approx((first, second))
        assert method.weights_of(f"model.layers.{layer}.attn.3.weight") == pytest.approx((first, 0.5))
    assert method.weights_of("embed.weight") == (0.0, 0.5), "the beginning, for tensors of no layer"
    with pytest.raises(fm.ArgumentError, match="lies beyond the 5 layers"):
        method.weights_of("model.layers.5.mlp.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "dare_ties"}, "merge_method: 'dare_ties' is not computed here as mergekit does"),
        ({"merge_method": "slerp"}, "freemerge mergekit-yaml runs it in mergekit"),
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
        ({"merge_method": "ties", "parameters": {"density": [0.1, 0.5]}}, "weight: ties has one"),
        ({"models": [{"model": "math", "parameters": {"weight": "high"}}]}, "weight: must be a number"),
        ({"parameters": {"densty": 1}}, "parameters: densty is not known for task_arithmetic"),
        ({"parameters": {"lambda": "x"}}, "lambda: must be a number"),
        ({"parameters": {"normalize": 1}}, "normalize: must be true or false"),
        ({"merge_method": "linear", "parameters": {"normalize": False}}, "normalize: linear without it"),
        ({"merge_method": "ties"}, "weight: ties has one positive weight"),
        ({"merge_method": "ties", "parameters": {"rescale": True}}, "rescale"),
        ({"merge_method": "ties", "parameters": {"normalize": False}}, "normalize"),
        ({"dtype": "int8"}, "out_dtype must be"),
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
    assert main(["init", "--mergekit", str(file)]) == 2
    assert "cannot be written as a recipe" in capsys.readouterr().err
    assert main(["merge", *paths, "--mergekit", str(file), "-o", str(out)]) == 2
    assert "--mergekit names base and models" in capsys.readouterr().err
    assert main(["merge", "-o", str(out)]) == 2
    assert "BASE and at least one MODEL are required" in capsys.readouterr().err
