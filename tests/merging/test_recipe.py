"""Recipes: validation names the field, YAML goes there and back, presets are what the scripts do."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import freemerge as fm
from freemerge.merging.mergekit_yaml import read_mergekit
from freemerge.merging.recipe import PRESETS
from freemerge.merging.selection import Rule, Split, Stack
from freemerge.methods import METHODS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(fm.Recipe.preset(name).to_yaml())
    assert fm.Recipe.from_yaml(path) == fm.Recipe.preset(name)


def test_everything_survives_yaml(tmp_path: Path) -> None:
    recipe = fm.Recipe(
        fm.Butterworth(0.2, 3, metric="normalized"),
        weights=[0.1, 0.9],
        stats="filtered",
        scope="tensor",
        scale=0.3,
        renormalize=None,
        align=True,
        sign_election=True,
        select=[("*.bias", "copy"), Rule("*", "filter")],
        views=[Stack(("*.q.weight", "*.k.weight")), Split("*.qkv.weight", (4, 2, 2))],
        compute_dtype="float64",
        out_dtype="bfloat16",
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert fm.Recipe.from_yaml(path) == recipe


def test_a_file_may_start_from_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: official-vit30\nscale: 0.2\n")
    assert fm.Recipe.from_yaml(path) == fm.Recipe.preset("official-vit30").replace(scale=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response": "HighPass"}, "response must be"),
        ({"weights": "papper"}, "weights must be"),
        ({"weights": [1.0, float("nan")]}, "weights must be .* or a list of finite numbers"),
        ({"weights": []}, "weights must be"),
        ({"stats": "all"}, "stats must be one of"),
        ({"scope": "row"}, "scope must be one of"),
        ({"scale": float("inf")}, "scale must be"),
        ({"scale": True}, "scale must be"),
        ({"renormalize": "none"}, "renormalize must be one of"),
        ({"align": 1}, "align must be"),
        ({"select": "*"}, "select must be a list"),
        ({"select": [("*", "skip")]}, "select: action must be one of"),
        ({"rename": "a=b"}, "rename must be a list"),
        ({"rename": [("a", 1)]}, "rename: expected two prefixes"),
        ({"rename": [{"from": "a"}]}, "rename: expected two prefixes"),
        ({"select": ["*"]}, "select: a rule is {pattern: ..., action: ...}, got"),
        ({"views": [{"stack": ["*.q"]}]}, "views: a stack needs"),
        ({"views": [{"split": "*.qkv", "parts": 0}]}, "views: parts must be"),
        ({"views": [{"stak": ["*.q"]}]}, "views: expected"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype must be one of"),
        ({"out_dtype": "int8"}, "out_dtype must be one of"),
        ({"method": "fre"}, "method must be one of average, .*, fr, .*, got 'fre'; did you mean 'fr'"),
        ({"method": None}, "method must be one of"),
        (
            {"method": "average", "response": fm.HighPass(0.4)},
            "response: method average has no filter of its own; filter='before'",
        ),
        ({"method": "average", "sclae": 1.0}, "no field 'sclae'; did you mean 'scale'"),
        ({"wieghts": "sum"}, "no field 'wieghts'; did you mean 'weights'"),
    ],
)
def test_errors_name_the_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        fm.Recipe(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cutof: 0.4\n", "no field 'cutof'"),
        ("wieghts: paper\n", "did you mean 'weights'"),
        ("preset: official-vit\n", "did you mean 'official-vit"),
        ("response: {type: HighPas, cutoff: 0.1}\n", "response must be a mapping with type"),
        ("response: {type: HighPass, cut: 0.1}\n", "no option 'cut'"),
        ("response: {type: HighPass}\n", "HighPass"),
        ("- 1\n", "must be a mapping"),
        ("a: [\n", "recipe.yaml"),
        ("scale: 1\nscale: 2\n", "'scale' is given twice"),
        ("response: {type: HighPass, cutoff: 0.1, cutoff: 0.2}\n", "'cutoff' is given twice"),
        ("response: {type: [HighPass], cutoff: 0.1}\n", "response must be a mapping with type"),
        ('response: {type: HighPass, cutoff: "0.1"}\n', "cutoff must be a finite number >= 0"),
        ("response: {type: HighPass, cutoff: true}\n", "cutoff must be a finite number >= 0"),
        ("response: {type: BandGain, cutoff: 0.1, low: a, high: 1}\n", "low must be a finite number of a size up to"),
        ("preset: 5\n", "preset must be one of"),
        ("method: [fr]\n", "method must be one of"),
        ("method: average\nalign: true\n", "method average has no field 'align'"),
        ("response: null\n", "response must be"),
        ("5: 6\n", "no field '5'"),
        ("preset: [paper]\n", "preset must be one of"),
        (f"scale: {'1' * 400}\n", "scale must be"),
        ("select: [{pattern: 5, action: merge}]\n", "select: a pattern must be a string"),
        ("views: [{stack: 5}]\n", "views: a stack is a list of patterns"),
        ("views: [{stack: [1, 2]}]\n", "views: a stack is a list of patterns"),
        ("views: [{split: 3, parts: 2}]\n", "views: a pattern must be a string"),
        ("views: [{split: w, parts: null}]\n", "views: parts must be"),
        ("views: [{split: w, parts: true}]\n", "views: parts must be"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_bad_files_name_the_file_and_the_field(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(fm.ArgumentError, match=message) as caught:
        fm.Recipe.from_yaml(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(fm.ArgumentError, match=r"nowhere\.yaml"):
        fm.Recipe.from_yaml(tmp_path / "nowhere.yaml")


def test_a_custom_response_cannot_be_written_down() -> None:
    with pytest.raises(fm.ArgumentError, match="Custom cannot be serialised"):
        fm.Recipe(fm.Custom([[0.0]])).to_yaml()


def test_unknown_preset() -> None:
    with pytest.raises(fm.ArgumentError, match="did you mean 'paper'"):
        fm.Recipe.preset("papers")


def test_the_default_is_the_documented_one() -> None:
    recipe = fm.Recipe()
    assert recipe.response == fm.HighPass(0.4)
    assert (recipe.weights, recipe.stats, recipe.scope, recipe.scale) == ("magnitude", "raw", "model", "auto")
    assert recipe.renormalize == "energy"
    assert fm.Recipe.preset("paper") == recipe.replace(scale=1.0, renormalize=None)


def test_a_method_by_name_and_its_parameters() -> None:
    recipe = fm.Recipe(method="task_arithmetic", weights=[0.3, 0.7], scale=0.5, out_dtype="bfloat16")
    assert recipe.method == fm.methods.TaskArithmetic(weights=(0.3, 0.7))
    assert recipe == fm.Recipe(method=fm.methods.TaskArithmetic(weights=(0.3, 0.7)), scale=0.5, out_dtype="bfloat16")
    assert recipe.weights == (0.3, 0.7)
    assert recipe.replace(weights="sum").method == fm.methods.TaskArithmetic()
    assert recipe.replace(method="task_arithmetic") == recipe
    assert recipe.replace(method="average").method == fm.methods.Average()
    assert recipe.replace(method="average").out_dtype == "bfloat16"
    assert "align" not in recipe.to_config()
    with pytest.raises(AttributeError, match="task_arithmetic has no field 'align'"):
        _ = recipe.align


@pytest.mark.parametrize("name", METHODS)
def test_every_method_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe = fm.Recipe(method=name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert f"method: {name}" in path.read_text()
    assert fm.Recipe.from_yaml(path) == recipe


def test_recipes_are_values() -> None:
    recipe = fm.Recipe(fm.Gaussian(0.2), weights="sum", select=[("*.bias", "copy")])
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == dataclasses.replace(recipe) == recipe
    assert len({recipe, dataclasses.replace(recipe), recipe.replace(scale=1)}) == 2
    assert dataclasses.replace(recipe, scale=0.5, align=True) == recipe.replace(scale=0.5, align=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.scale = 2.0  # type: ignore[misc]


def test_the_magnitude_rule_has_an_earlier_name(tmp_path: Path) -> None:
    assert fm.Recipe(weights="paper") == fm.Recipe(weights="magnitude")
    (tmp_path / "recipe.yaml").write_text("weights: paper\n")
    assert fm.Recipe.from_yaml(tmp_path / "recipe.yaml").to_config()["weights"] == "magnitude"


def test_a_cutoff_is_short_for_a_response() -> None:
    assert fm.Recipe(cutoff=0.2) == fm.Recipe(fm.HighPass(0.2))
    assert fm.Recipe(fm.Gaussian(0.1), cutoff=0.2).response == fm.Gaussian(0.2)
    assert fm.Recipe.preset("official-roberta").replace(cutoff=0.2).response == fm.HighPass(0.2)
    assert fm.Recipe.from_config({"cutoff": 0.2}).to_config() == fm.Recipe(fm.HighPass(0.2)).to_config()


def test_numbers_from_numpy_are_plain_numbers(tmp_path: Path) -> None:
    recipe = fm.Recipe(fm.HighPass(np.float64(0.25)), weights=list(np.ones(2, np.float32)), scale=np.float64(0.5))
    assert repr(recipe.response) == repr(fm.HighPass(0.25))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert fm.Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


def test_the_documented_defaults_are_the_defaults() -> None:
    text = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    documented = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    expected = fm.Recipe().to_config()
    assert documented.keys() == {"version", "rename", *expected}
    assert fm.Recipe.from_config(documented) == fm.Recipe()


def test_an_exponent_makes_a_number_as_in_yaml_1_2(tmp_path: Path) -> None:
    for text, scale in (("1e-1", 0.1), ("2E0", 2.0), ("+.5e+1", 5.0), ("1.e-2", 0.01), ("0.5", 0.5), ("-3e1", -30.0)):
        (tmp_path / "recipe.yml").write_text(f"scale: {text}\n")
        assert fm.Recipe.from_yaml(tmp_path / "recipe.yml").scale == scale
    (tmp_path / "recipe.yml").write_text("select: [{pattern: 1e5x, action: copy}]\n")
    assert fm.Recipe.from_yaml(tmp_path / "recipe.yml").select[0].pattern == "1e5x"


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("got 'ties'; give a method as method=$", lambda: fm.Recipe("ties")),
        ("filter='before' or filter='after'", lambda: fm.Recipe(fm.HighPass(0.2), method="iso_c")),
        (r"one of average, breadcrumbs, dare, .*, got 'slerp'$", lambda: fm.Recipe(method="slerp")),
        (r"got 'nothing alike'$", lambda: fm.Recipe.preset("nothing alike")),
        ("did you mean 'HighPass'", lambda: fm.Recipe(response={"type": "HighPas"})),
        ("did you mean 'cutoff'", lambda: fm.Recipe(response={"type": "HighPass", "cutof": 1})),
        ("got 'unifrm'; did you mean 'uniform'", lambda: fm.Recipe(weights="unifrm")),
        ("got 'bf17'; did you mean 'bf16'", lambda: fm.extract_experts({}, [{}], values="bf17")),
        ("weights has 1 number for 2 models", lambda: fm.merge({}, [{}, {}], fm.Recipe(weights=[1.0]))),
        ("got str; give a method as method=, or Recipe.preset", lambda: fm.merge({}, [{}], "ties")),
    ],
)
def test_errors_say_once_what_may_be_meant(message: str, make: Callable[[], object]) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        make()


@pytest.mark.parametrize("text", ["scale: 2024-13-45", f"scale: {'9' * 5000}", "self: 1", "- " * 2000])
def test_a_file_that_is_no_recipe_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(fm.ArgumentError, match=r"recipe\.yaml: "):
        fm.Recipe.from_yaml(path)
    with pytest.raises(fm.ArgumentError, match=r"recipe\.yaml: "):
        read_mergekit(path)
