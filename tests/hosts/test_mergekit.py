"""freemerge's methods in mergekit, of the version that is installed: on files, against our engine, tensor by tensor."""

from __future__ import annotations

import os
import signal
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit import merge_methods

import freemerge as fm
from freemerge.cli import main
from freemerge.integrations import mergekit
from freemerge.methods import METHODS
from freemerge.signals import stops
from hosts.checkpoints import write_models
from hosts.states import assert_equal_to_the_engine, tensors_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="session", params=DTYPES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_models(tmp_path_factory.mktemp(request.param), 3, DTYPES[request.param])


def merged(
    models: list[str], out: Path, config: dict[str, Any], *, weights: list[float] | None = None, code: int = 0
) -> dict[str, Any]:
    """What `freemerge mergekit-yaml` writes for a configuration; nothing where it ends with another ``code``."""
    listed: list[dict[str, Any]] = [{"model": model} for model in models[1:]]
    for entry, weight in zip(listed, weights or [], strict=False):
        entry["parameters"] = {"weight": weight}
    stored = str(next(iter(tensors_of(models[0]).values())).dtype).removeprefix("torch.")
    content = {"models": listed, "base_model": models[0], "dtype": stored} | config
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(content))
    assert main(["mergekit-yaml", str(path), str(out), "--no-copy-tokenizer"]) == code
    return {} if code else tensors_of(out)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_by_its_defaults(method: str, models: list[str], tmp_path: Path) -> None:
    found = merged(models, tmp_path / "out", {"merge_method": f"freemerge_{method}"})
    assert_equal_to_the_engine(found, models, fm.Recipe(method=method))


NUMBERS: list[tuple[str, dict[str, Any]]] = [
    ("fr", {"cutoff": 0.1, "scale": 0.7}),
    ("fr", {"cutoff": 0.3, "align": True, "sign_election": True}),
    ("ties", {"density": 0.5, "scale": 1.5}),
    ("dare", {"drop": 0.5, "seed": 3, "sign_election": True}),
    ("breadcrumbs", {"beta": 0.5, "gamma": 0.1}),
    ("task_arithmetic", {"scale": 0.25}),
]
WORDS: list[tuple[str, dict[str, Any]]] = [
    ("fr", {"cutoff": 0.1, "weights": "uniform", "stats": "filtered"}),
    ("ties", {"density": 0.3, "scope": "tensor"}),
]
HAS_WORDS = hasattr(merge_methods, "register")  # not in the configurations of mergekit 0.1.4


@pytest.mark.parametrize(("method", "parameters"), NUMBERS + WORDS * HAS_WORDS)
def test_parameters(method: str, parameters: dict[str, Any], models: list[str], tmp_path: Path) -> None:
    found = merged(models, tmp_path / "out", {"merge_method": f"freemerge_{method}", "parameters": parameters})
    assert_equal_to_the_engine(found, models, fm.Recipe(method=method, **parameters))


@pytest.mark.parametrize("method", ["fr", "task_arithmetic", "average", "dare", "ties", "breadcrumbs"])
def test_weights_of_each_model(method: str, models: list[str], tmp_path: Path) -> None:
    weights = [0.5, -0.25, 1.0]
    found = merged(models, tmp_path / "out", {"merge_method": f"freemerge_{method}"}, weights=weights)
    assert_equal_to_the_engine(found, models, fm.Recipe(method=method), weights)


def test_gradients_and_filters_of_mergekit_work(models: list[str], tmp_path: Path) -> None:
    parameters = {"scale": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]}
    config = {"merge_method": "freemerge_task_arithmetic", "parameters": parameters}
    found = merged(models, tmp_path / "out", config)
    base, *others = [tensors_of(model) for model in models]
    for name, tensor in base.items():
        recipe = fm.Recipe(method="task_arithmetic", scale=0.5 if "mlp" in name else 1.0)
        assert torch.equal(found[name], fm.merge_tensors(tensor, [m[name] for m in others], recipe=recipe, name=name))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"merge_method": "freemerge_ties", "parameters": {"density": 3.0}}, "density must be"),
        ({"merge_method": "freemerge_dare", "parameters": {"seed": 0.5}}, "seed must be"),
    ],
)
def test_errors_name_the_parameter(
    config: dict[str, Any], message: str, tmp_path: Path, models: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yml"
    listed = [{"model": model} for model in models[1:]]
    path.write_text(yaml.safe_dump({"models": listed, "base_model": models[0], "dtype": "float32"} | config))
    assert main(["mergekit-yaml", str(path), str(tmp_path / "out"), "--no-copy-tokenizer"]) != 0
    assert message in capfd.readouterr().err


def test_some_weights_are_an_error() -> None:
    tensors = [torch.ones(2, 2)] * 2
    with pytest.raises(fm.ArgumentError, match="1 of 2 models have one"):
        mergekit.merge(fm.methods.FR, torch.zeros(2, 2), tensors, {}, [None, 1.0], "w")


@pytest.mark.parametrize(("option", "code", "told"), [("--help", 0, "--allow-crimes"), ("--nonsense", 2, "--nonsense")])
def test_help_and_options_are_mergekits(option: str, code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["mergekit-yaml", option])
    assert caught.value.code == code
    captured = capsys.readouterr()
    assert told in (captured.err if code else captured.out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_as_they_end_other_commands(
    number: int,
    code: int,
    models: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mergekit.scripts.run_yaml.run_merge", lambda *_, **__: os.kill(os.getpid(), number))
    with stops():
        assert merged(models, tmp_path / "out", {"merge_method": "linear"}, weights=[1.0] * 3, code=code) == {}
    assert capsys.readouterr().err.splitlines()[-1] in ("freemerge: interrupted", "freemerge: terminated")


@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ({"renormalize": "none", "scale": "0.7"}, {"renormalize": None, "scale": 0.7}),
        ({"renormalize": "energy", "weights": "0.5,0.25,1"}, {"weights": [0.5, 0.25, 1.0]}),
    ],
)
def test_words_and_none(values: dict[str, Any], meant: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *others = (torch.randn(6, 5, generator=generator) for _ in range(4))
    found = mergekit.merge(fm.methods.FR, base, others, values, [None] * 3, "w")
    assert torch.equal(found, fm.merge_tensors(base, others, recipe=fm.Recipe(**meant), name="w"))
    with pytest.raises(fm.ArgumentError, match="renormalize must be one of 'none', 'energy', got 'no'"):
        mergekit.merge(fm.methods.FR, base, others, {"renormalize": "no"}, [None] * 3, "w")


OWN: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("linear", [1.0, 2.0, 0.5], {}),
    ("task_arithmetic", [0.5, 0.3, -0.2], {"lambda": 0.8}),
    ("task_arithmetic", [0.5, 0.3, 0.2], {"normalize": True}),
    ("task_arithmetic", [[{"filter": "mlp", "value": 0.6}, {"value": 0.1}], 0.3, 0.2], {}),
    ("task_arithmetic", [[0.1, 0.9], [{"filter": "mlp", "value": [0.0, 0.5]}, {"value": 0.1}], 0.2], {}),
    ("ties", [0.5, 0.5, 0.5], {"density": 0.5}),
    ("ties", [1.0, 1.0, 1.0], {"density": 0.25, "lambda": 0.7, "int8_mask": True}),
    ("ties", [0.5, 0.3, 0.2], {"density": 0.5}),
    ("ties", [2.0, 0.0, 1.0], {"density": 0.25, "lambda": 0.7}),
    ("breadcrumbs", [0.5, 0.3, -0.2], {"density": 0.5, "gamma": 0.125}),
    ("breadcrumbs", [0.5, 0.3, 0.1], {"density": 0.75, "gamma": 0.5, "normalize": True, "lambda": 0.7}),
    ("model_stock", [], {}),
    ("model_stock", [], {"filter_wise": False}),
]


@pytest.mark.parametrize(("method", "weights", "parameters"), OWN)
def test_a_configuration_means_the_same_here_and_there(
    method: str, weights: list[Any], parameters: dict[str, Any], tmp_path: Path
) -> None:
    models = write_models(tmp_path, 3)
    content: dict[str, Any] = {
        "merge_method": method,
        "base_model": models[0],
        "models": [
            {"model": model, "parameters": {} if weight is None else {"weight": weight}}
            for model, weight in zip_longest(models[1:], weights)
        ],
        "parameters": parameters,
        "dtype": "float32",
    }
    if method == "linear":  # the base is one of the models
        content["models"].append({"model": models[0], "parameters": {"weight": 0.7}})
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(content))
    assert main(["mergekit-yaml", str(path), str(tmp_path / "there"), "--no-copy-tokenizer"]) == 0
    assert main(["merge", "--mergekit", str(path), "-o", str(tmp_path / "here"), "--json"]) == 0
    here, there, base = (tensors_of(folder) for folder in (tmp_path / "here", tmp_path / "there", models[0]))
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        torch.testing.assert_close(here[name], tensor, atol=2e-7, rtol=1e-6, msg=name)
        assert (here[name] - base[name]).abs().max() > 1e-3, name
