"""freemerge's methods in sd-mecha: on files, against our engine, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sd_mecha
import torch
from safetensors.torch import load_file
from torch import Tensor

import freemerge as fm
from freemerge.integrations import sd_mecha as adapter
from freemerge.methods import METHODS
from hosts.states import assert_equal_to_the_engine, write_states

resolve = sd_mecha.extensions.merge_methods.resolve


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_states(tmp_path_factory.mktemp("states"), 3)


def merged(models: list[Path], method: str, **parameters: Any) -> dict[str, Tensor]:
    nodes = [sd_mecha.model(path) for path in models]
    return run(resolve(f"freemerge_{method}")(*nodes, **parameters))


def run(recipe: Any) -> dict[str, Tensor]:
    """The tensors of a recipe; sd-mecha adds what it was."""
    found = dict(sd_mecha.merge(recipe, output_dtype=torch.float32, check_extra_keys=False))
    found.pop("__metadata__")
    return found


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_by_its_defaults(method: str, models: list[Path]) -> None:
    assert_equal_to_the_engine(merged(models, method), models, fm.Recipe(method=method))


@pytest.mark.parametrize(
    ("method", "given", "meant"),
    [
        ("fr", {"cutoff": 0.1, "scale": "0.7", "align": True}, {"cutoff": 0.1, "scale": 0.7, "align": True}),
        ("fr", {"weights": "0.5,-0.25,1", "stats": "filtered"}, {"weights": [0.5, -0.25, 1.0], "stats": "filtered"}),
        ("fr", {"renormalize": "none", "weights": "sum"}, {"renormalize": None, "weights": "sum"}),
        ("ties", {"density": 0.5, "scale": "auto"}, {"density": 0.5}),
        ("dare", {"drop": 0.5, "seed": 3}, {"drop": 0.5, "seed": 3}),
    ],
)
def test_parameters(method: str, given: dict[str, Any], meant: dict[str, Any], models: list[Path]) -> None:
    assert_equal_to_the_engine(merged(models, method, **given), models, fm.Recipe(method=method, **meant))


def test_a_method_is_a_node_among_others(models: list[Path]) -> None:
    base, a, b, _ = (sd_mecha.model(path) for path in models)
    recipe = sd_mecha.weighted_sum(base, adapter.freemerge_average(base, a, b), alpha=0.5)
    found = run(recipe)
    states = [load_file(path) for path in models]
    for name, tensor in states[0].items():
        expected = tensor + 0.25 * (states[1][name] - tensor) + 0.25 * (states[2][name] - tensor)
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize(
    ("given", "message"), [({"scale": "big"}, "scale must be"), ({"density": 3.0}, "density must")]
)
def test_errors_name_the_parameter(given: dict[str, Any], message: str, models: list[Path]) -> None:
    with pytest.raises(Exception, match=message):
        merged(models, "ties", **given)
