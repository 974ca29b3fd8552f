"""The JSON schema of recipes accepts what recipes are, and nothing that they refuse for its names and types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import freemerge as fm
from cases import RESPONSES
from freemerge.cli import main
from freemerge.merging.recipe import PRESETS
from freemerge.merging.schema import recipe_schema

PRESET_FILES = sorted((Path(fm.__file__).parent / "merging" / "presets").glob("*.yaml"))
TYPES = {"object": dict, "array": (list, tuple), "string": str, "number": (int, float), "integer": int, "boolean": bool}


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """The keywords of JSON schema that ours uses; any other one fails."""
    for keyword, asked in schema.items():
        if keyword in ("$schema", "title", "description", "if", "required", "minimum", "maximum"):
            continue
        if keyword == "type":
            if not isinstance(value, TYPES[asked]) or (isinstance(value, bool) and asked != "boolean"):
                return False
        elif keyword == "const":
            if value != asked or isinstance(value, bool) != isinstance(asked, bool):
                return False
        elif keyword == "enum":
            if value not in asked:
                return False
        elif keyword == "anyOf":
            if not any(valid(value, option) for option in asked):
                return False
        elif keyword == "allOf":
            if not all(valid(value, option) for option in asked):
                return False
        elif keyword == "then":
            if valid(value, schema["if"]) and not valid(value, asked):
                return False
        elif keyword == "properties":
            if not all(valid(value[name], sub) for name, sub in asked.items() if name in value):
                return False
        elif keyword == "dependentRequired":
            if not all(set(needed) <= value.keys() for name, needed in asked.items() if name in value):
                return False
        elif keyword == "additionalProperties":
            if not asked and value.keys() - schema["properties"].keys():
                return False
        elif keyword == "propertyNames":
            if not all(valid(name, asked) for name in value):
                return False
        elif keyword == "items":
            if not all(valid(item, asked) for item in value):
                return False
        elif keyword == "prefixItems":
            if not all(map(valid, value, asked)):
                return False
        elif keyword == "minItems":
            if len(value) < asked:
                return False
        elif keyword == "maxItems":
            if len(value) > asked:
                return False
        else:
            raise AssertionError(f"keyword {keyword}")
    if isinstance(value, dict) and not set(schema.get("required", ())) <= value.keys():
        return False
    number = isinstance(value, int | float)
    return not number or schema.get("minimum", value) <= value <= schema.get("maximum", value)


@pytest.mark.parametrize("file", PRESET_FILES, ids=lambda file: file.stem)
def test_presets(file: Path) -> None:
    assert valid(yaml.safe_load(file.read_text()), recipe_schema())
    assert file.stem in PRESETS


@pytest.mark.parametrize(
    "recipe",
    [
        *(fm.Recipe(method=method) for method in fm.methods.METHODS),
        fm.Recipe(method="ties", filter="before"),
        fm.Recipe(fm.Gaussian(0.1), method="average", filter="after"),
        *(fm.Recipe(response) for response in RESPONSES if type(response).__name__ in fm.responses.RESPONSES),
        fm.Recipe(
            weights=[0.5, 1],
            scale=2,
            select=[("*.bias", "copy")],
            views=[fm.Stack(("*.q", "*.k")), fm.Split("*.qkv", 3), fm.Split("*.x", (1, 2))],
            layers=[("h.0.*", (0.1, 2))],
            rename=[("", "model.")],
            out_dtype="float16",
        ),
    ],
    ids=str,
)
def test_recipes(recipe: fm.Recipe) -> None:
    written = yaml.safe_load(recipe.to_yaml())
    assert written["version"] == 1
    assert valid(written, recipe_schema())
    assert fm.Recipe.from_config(written) == recipe


@pytest.mark.parametrize(
    "config",
    [
        {"wieghts": "uniform"},
        {"weights": "foo"},
        {"weights": []},
        {"weights": [True]},
        {"method": "averag"},
        {"method": "average", "align": True},
        {"method": "average", "cutoff": 0.1},
        {"filter": "during", "method": "average"},
        {"method": "ties", "density": 2},
        {"method": "dare", "seed": -1},
        {"align": 1},
        {"scale": "big"},
        {"out_dtype": "int8"},
        {"response": {"type": "HighPass"}},
        {"response": {"type": "HighPass", "cutoff": "low"}},
        {"response": {"type": "HighPass", "cutoff": 0.2, "unit": "bin"}},
        {"response": {"type": "Sharp"}},
        {"select": [{"pattern": "*", "action": "skip"}]},
        {"select": [["*"]]},
        {"views": [{"stack": ["*.q"]}]},
        {"views": [{"split": "*", "parts": 0}]},
        {"layers": [["h.0.*"]], "weights": [1]},
        {"layers": [{"pattern": "h.0.*", "weights": "uniform"}], "weights": [1]},
        {"rename": [["a"]]},
        {"version": 2},
        {"version": True},
        {"preset": "papers"},
    ],
    ids=str,
)
def test_mistakes_are_refused_by_schema_and_recipe(config: dict[str, Any]) -> None:
    assert not valid(config, recipe_schema())
    with pytest.raises(fm.ArgumentError):
        fm.Recipe.from_config(config)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(recipe_schema()))
