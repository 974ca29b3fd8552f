"""freemerge init: a recipe to start from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from command_line import merged, run
from safetensors.torch import load_file, save_file

import freemerge as fm
from freemerge.merging.commented import commented_recipe
from freemerge.merging.recipe import PRESETS, Recipe
from freemerge.methods import METHODS


def test_init(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yml"
    options = ["--method", "iso_c", "--filter", "after", "--cutoff", "0.2", "--select", "*.bias=copy"]
    recipe = Recipe(method="iso_c", filter="after", cutoff=0.2, select=[("*.bias", "copy")])
    assert run("init", *files, *options, "-o", file) == 0
    assert run("init", *files, *options) == 0
    assert file.read_text().splitlines()[2:] == capsys.readouterr().out.splitlines()[3:], "the head names the file"
    assert Recipe.from_yaml(file) == recipe
    text = file.read_text()
    assert f"--recipe {file} -o OUT" in text
    assert "# strength of the merged task vector: auto, interference or a finite number\nscale: auto\n" in text
    assert "1 tensor filtered, 0 merged unfiltered, 1 copied" in text
    assert "\nrename: []\n" in text, "defaults, too"
    assert run("merge", *files, "--recipe", file, "-o", tmp_path / "out", "-q") == 0
    expected = fm.merge(files[0], files[1:], recipe)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged(tmp_path / "out").items())
    assert run("init", *files, "-o", file) == 3
    assert file.read_text() == text
    assert run("init", *files, "-o", file, "--force") == 0
    assert Recipe.from_yaml(file) == Recipe()
    assert run("init", *files, "-o", file, "--force", "--method", "task_arithmetic", "--weights", "1,2") == 0
    assert {"filter", "layers", "rename"} < set(yaml.safe_load(file.read_text()))
    assert Recipe.from_yaml(file) == Recipe(method="task_arithmetic", weights=[1.0, 2.0])
    assert run("init", files[0], tmp_path / "nowhere") == 1


def test_a_recipe_for_models_whose_names_are_no_text(files: list[str], tmp_path: Path) -> None:
    model = tmp_path / os.fsdecode(b"m\xff.safetensors")
    save_file(load_file(files[1]), model)
    assert run("init", files[0], model, "-o", tmp_path / "recipe.yml") == 0
    assert Recipe.from_yaml(tmp_path / "recipe.yml") == Recipe()


def test_a_recipe_for_paths_with_control_characters(files: list[str], tmp_path: Path) -> None:
    model = tmp_path / "m\x1b\x85\n.safetensors"
    save_file(load_file(files[1]), model)
    assert run("init", files[0], model, "-o", tmp_path / "recipe.yml") == 0
    assert Recipe.from_yaml(tmp_path / "recipe.yml") == Recipe()


@pytest.mark.parametrize(
    "options",
    [
        ["--cutoff", "10"],
        ["--scale", "0"],
        ["--weights", "0,0"],
        ["--select", "*=copy"],
        ["--method", "ties", "--density", "0"],
    ],
)
def test_what_merge_refuses_is_no_recipe_and_a_warning_of_inspect(
    options: list[str], files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", *files, *options, "-o", tmp_path / "out") == 2
    refusal = capsys.readouterr().err.removeprefix("freemerge: ")
    assert run("init", *files, *options, "-o", tmp_path / "recipe.yml") == 2
    assert capsys.readouterr().err == f"freemerge: {refusal}"
    assert not (tmp_path / "recipe.yml").exists()
    assert run("inspect", *files, *options) == 0
    assert f"warning: {refusal}" in capsys.readouterr().err


EVERYTHING = Recipe(
    method="task_arithmetic", weights=[0.1, 0.2], layers=[("*.0.*", [0.3, 0.4])], filter="before", cutoff=0.3,
    select=[("*.bias", "copy")], rename=[("a.", "b.")], views=[{"split": "*.qkv", "parts": 3}], out_dtype="float16",
)  # fmt: skip


@pytest.mark.parametrize("recipe", [EVERYTHING, *(Recipe(method=m) for m in METHODS), *map(Recipe.preset, PRESETS)])
def test_a_commented_recipe_is_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    file.write_text(commented_recipe(recipe, ["one", "", "two"]))
    assert Recipe.from_yaml(file) == recipe
    keys = [line.split(":")[0] for line in file.read_text().splitlines() if line[:1].isalpha()]
    config = recipe.to_config()
    assert [key for key in keys if key in config] == [*config]
    assert set(keys) - set(config) <= {"version", "filter", "layers", "rename"}, (
        "these are left out where they are empty"
    )
    assert {"version", "rename"} < set(keys)
