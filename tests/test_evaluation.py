"""Scoring models with a user's function."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import freemerge as fm
from freemerge.evaluation import Evaluation, evaluate, evaluate_experts, load_function, sweep, table
from freemerge.experts import extract_experts, save_experts

UNFILTERED = fm.Recipe(response=fm.HighPass(0), weights="sum", renormalize=None)


def distances(weights: Mapping[str, Tensor]) -> dict[str, float]:
    return {"near": -float(weights["w"].sub(1).norm()), "far": -float(weights["w"].sub(3).norm())}


def test_a_checkpoint_and_a_state_dict_score_alike(tmp_path: Path) -> None:
    weights = {"w": torch.full((4, 4), 2.0), "n": torch.arange(3)}
    save_file(weights, tmp_path / "model.safetensors")
    expected = {"near": -4.0, "far": -4.0}
    assert evaluate(weights, distances).scores == expected
    evaluation = evaluate(tmp_path / "model.safetensors", distances)
    assert (evaluation.scores, evaluation.mean) == (expected, -4.0)
    assert "model" in evaluation.label


def test_a_single_number_is_a_score() -> None:
    assert evaluate({"w": torch.ones(2, 2)}, lambda weights: weights["w"].sum()).scores == {"score": 4.0}


@pytest.mark.parametrize(
    "returned", [None, "high", {}, {"a": None}, float("nan"), 10**400, {"a": 1.0, "b": float("inf")}]
)
def test_a_function_that_returns_no_numbers_is_refused(returned: object) -> None:
    with pytest.raises(fm.ArgumentError, match="function must return"):
        evaluate({"w": torch.ones(1)}, lambda weights: returned)  # type: ignore[arg-type, return-value]


def test_experts_are_scored_on_their_own_tasks(tmp_path: Path) -> None:
    base = {"w": torch.zeros(4, 4)}
    models = {"near": {"w": torch.full((4, 4), 1.0)}, "far": {"w": torch.full((4, 4), 3.0)}}
    experts = extract_experts(base, models, density=0.99, rescale=1.0, values="fp32")
    merged = {"w": torch.zeros(4, 4)}
    evaluation = evaluate_experts(merged, experts, distances)
    # 15 of the 16 entries are kept, so what is missing is one entry's distance to each task's target.
    assert evaluation.scores == {"near": pytest.approx(-1.0), "far": pytest.approx(-3.0)}
    assert torch.equal(merged["w"], torch.zeros(4, 4))
    save_experts(experts.items(), tmp_path / "experts")
    assert evaluate_experts(merged, tmp_path / "experts", distances).scores == evaluation.scores
    with pytest.raises(fm.ArgumentError, match="no score for the expert 'near'"):
        evaluate_experts(merged, experts, lambda weights: {"other": 1.0})
    with pytest.raises(fm.ArgumentError, match="at least one expert"):
        evaluate_experts(merged, {}, distances)


def test_tied_tensors_stay_tied_while_experts_are_on() -> None:
    """As in what fm.merge returns: a model that loads both names gets the second of them."""
    base = {"embed.weight": torch.zeros(4, 4)}
    experts = extract_experts(base, {"near": {"embed.weight": torch.ones(4, 4)}}, density=0.99, values="fp32")
    merged = torch.zeros(4, 4)
    seen: list[dict[str, Tensor]] = []

    def score(weights: dict[str, Tensor]) -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in weights.items()})
        return {"near": 1.0}

    evaluate_experts({"embed.weight": merged, "head.weight": merged}, experts, score)
    assert seen[0]["embed.weight"].any()
    assert torch.equal(seen[0]["head.weight"], seen[0]["embed.weight"])
    assert not merged.any()


def test_a_sweep_finds_the_scale() -> None:
    base = {"w": torch.zeros(8, 8)}
    models = [{"w": torch.full((8, 8), 1.0)}, {"w": torch.full((8, 8), 3.0)}]
    target = 2.0  # the sum of the task vectors is 4: scale 0.5 hits it
    found = sweep(base, models, UNFILTERED, [0.25, 0.5, 1.0], lambda weights: -float(weights["w"].sub(target).norm()))
    assert found.best == UNFILTERED.replace(scale=0.5)
    assert [evaluation.label for evaluation in found.evaluations] == ["scale 0.25", "scale 0.5", "scale 1"]
    assert [evaluation.scores["score"] for evaluation in found.evaluations] == pytest.approx([-8.0, 0.0, -16.0])
    assert torch.equal(base["w"], torch.zeros(8, 8))


@pytest.mark.parametrize(
    "recipe",
    [
        fm.Recipe(),
        fm.Recipe(method="iso_c"),
        fm.Recipe(method="ties", filter="after"),
        fm.Recipe(method="task_arithmetic", weights=[1, 2], layers=[("*.weight", (3, 1))], out_dtype="bfloat16"),
    ],
)
def test_a_sweep_merges_once_what_a_merge_gives_at_each_scale(
    recipe: fm.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (12, 20), "norm.weight": (8,), "norm.bias": (8,), "norm.running_mean": (8,), "steps": ()}

    def state() -> dict[str, Tensor]:
        made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return made | {"norm.running_var": torch.rand(8, generator=generator) + 0.5, "ids": torch.arange(3)}

    base, *models = (state() for _ in range(3))
    scales = [0.3, 1.0, 1.7]
    expected = [fm.merge(base, models, recipe.replace(scale=scale)) for scale in scales]
    merge, merged = type(recipe.method).merge, []

    def counted(self: fm.methods.Method, vectors: Any, measured: Any) -> Any:
        merged.extend(tensor.name for tensor in vectors.tensors)
        return merge(self, vectors, measured)  # type: ignore[arg-type]

    monkeypatch.setattr(type(recipe.method), "merge", counted)
    seen: list[dict[str, Tensor]] = []

    def score(weights: dict[str, Tensor]) -> float:
        seen.append(weights)
        return 1.0

    sweep(base, models, recipe, scales, score)
    assert sorted(merged) == ["a.weight", "norm.bias", "norm.weight", "steps"]
    for found, wanted in zip(seen, expected, strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def test_scores_of_other_tasks_are_not_compared() -> None:
    scores = iter([{"a": 0.5, "b": 0.5}, {"a": 0.9}])
    state = {"w": torch.ones(4, 4)}
    with pytest.raises(fm.ArgumentError, match="the same tasks at every scale, got a, b and then a"):
        sweep(state, [{"w": torch.zeros(4, 4)}], UNFILTERED, [0.1, 0.2], lambda weights: next(scores))
    with pytest.raises(fm.ArgumentError, match="two for one in"):
        evaluate(state, lambda weights: {1: 0.1, "1": 0.9})  # type: ignore[dict-item]


def test_a_file_may_import_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "neighbour_of_the_file.py").write_text("size = 5\n")
    (tmp_path / "scoring.py").write_text(
        "import neighbour_of_the_file as n\n\ndef score(weights):\n    return n.size\n"
    )
    before = [*sys.path]
    assert load_function(f"{tmp_path / 'scoring.py'}:score")({}) == 5
    (tmp_path / "bad.py").write_text("import sys\nsys.path.clear()\n1 / 0\n")
    monkeypatch.setattr(sys, "path", [*before])
    with pytest.raises(ZeroDivisionError):
        load_function(f"{tmp_path / 'bad.py'}:score")
    monkeypatch.undo()
    assert sys.path == before


@pytest.mark.parametrize("scales", [[0.5, 0.25, 1.0], [1.0, 0.25, 0.5]])
def test_a_sweep_takes_the_first_of_equals(scales: list[float]) -> None:
    state = {"w": torch.ones(4, 4)}
    assert sweep(state, [{"w": torch.zeros(4, 4)}], UNFILTERED, scales, lambda weights: 1.0).best.scale == scales[0]


def test_a_sweep_needs_scales() -> None:
    with pytest.raises(fm.ArgumentError, match="scales"):
        sweep({}, [{}], UNFILTERED, [], lambda weights: 0.0)


def test_functions_by_reference(tmp_path: Path) -> None:
    file = tmp_path / "scoring.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Size:\n    value: float\n"
        "def size(weights):\n    return Size(sum(t.numel() for t in weights.values())).value\n"
        "number = 3\n"
    )
    assert load_function(f"{file}:size")({"w": torch.ones(2, 3)}) == 6
    assert load_function("math:fsum") is __import__("math").fsum
    for reference, message in (
        ("size", "FILE.py:NAME"),
        (":size", "FILE.py:NAME"),
        ("..package:size", "FILE.py:NAME"),
        (f"{file}:absent", "no function 'absent'"),
        (f"{file}:number", "no function 'number'"),
        (f"{tmp_path / 'absent.py'}:size", "no file"),
        ("no_such_package:size", "no_such_package"),
    ):
        with pytest.raises(fm.ArgumentError, match=message):
            load_function(reference)


def test_an_error_inside_the_file_is_the_users_to_see(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_function(f"{tmp_path / 'broken.py'}:score")


def test_the_table_is_aligned() -> None:
    text = table([Evaluation("base", {"a": 0.5, "b": 0.25}), Evaluation("a longer name", {"a": 12.0})])
    assert text.splitlines() == [
        "model            a     b   mean",
        "base           0.5  0.25  0.375",
        "a longer name   12           12",
    ]
    assert table([Evaluation("m", {"score": 1.0})]).splitlines() == ["model  score", "m          1"]
