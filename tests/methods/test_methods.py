"""Methods against their formulas, the registry, and a method written as the documentation says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm
from freemerge.accumulate import add_round, norm, task_vector_sum
from freemerge.cli import main
from freemerge.methods import METHODS, Measured, Merged, Method
from freemerge.methods.parameters import number, parameter, parameters_of
from freemerge.methods.rules import energy_factor
from freemerge.methods.vectors import Sides, TaskVectors
from in_memory import State, states

SHAPES = {"up.weight": (24, 16), "qkv.weight": (12, 10), "up.bias": (24,)}


def vectors(base: State, models: list[State], name: str) -> Tensor:
    """The K task vectors of a tensor, float64."""
    return torch.stack([(model[name].double() - base[name].double()) for model in models])


@pytest.mark.parametrize(
    ("recipe", "coefficients"),
    [
        (fm.Recipe(method="average"), [1 / 3, 1 / 3, 1 / 3]),
        (fm.Recipe(method="average", weights=[0.5, 0.3, 0.1]), [0.5, 0.3, 0.1]),
        (fm.Recipe(method="average", scale=2), [2 / 3, 2 / 3, 2 / 3]),
        (fm.Recipe(method="task_arithmetic"), [0.4, 0.4, 0.4]),
        (fm.Recipe(method="task_arithmetic", scale=0.7), [0.7, 0.7, 0.7]),
        (fm.Recipe(method="task_arithmetic", weights=[1, -2, 0.5]), [1, -2, 0.5]),
    ],
)
def test_weighted_sums(recipe: fm.Recipe, coefficients: list[float]) -> None:
    base, models = states(SHAPES, 3)
    merged = fm.merge(base, models, recipe)
    for name, tensor in base.items():
        summed = torch.tensordot(torch.tensor(coefficients).double(), vectors(base, models, name), 1)
        torch.testing.assert_close(merged[name].double(), tensor.double() + summed, rtol=1e-6, atol=1e-6)
    inspection = fm.inspect(base, models, recipe)
    assert {decision.action for decision in inspection.decisions} == {"merge"}, "they treat matrices as anything else"
    assert inspection.passes == 1


def test_the_energy_factor_is_multiplied_where_the_base_is_added() -> None:
    base, models = states(SHAPES, 3)
    recipe, name = fm.Recipe(weights="uniform"), "up.weight"
    total, _ = task_vector_sum(base[name], [model[name] for model in models], [1 / 3] * 3)
    before = norm([total])
    fm.filter_(total, recipe.response)
    merged = Merged([total], factor=energy_factor(before, norm([total])))
    step_by_step = add_round(base[name], merged.complete().tensors[0], 1.2, base[name].dtype)
    assert norm([total]) == pytest.approx(before)
    assert torch.equal(fm.merge(base, models, recipe)[name], step_by_step)


@pytest.mark.parametrize("options", [{}, {"filter": "after"}, {"scale": "interference"}, {"scale": 0.7}], ids=str)
def test_whoever_reads_what_a_method_merged_heeds_its_factor(options: dict[str, Any], tmp_path: Path) -> None:
    """Powers of two, which round nothing."""

    @dataclass(frozen=True)
    class Halved(Method):
        """The mean, or half of it, of which the double is meant."""

        name = "halved"
        title = "halved"
        factor: float = parameter(1.0, "what is divided by", kind=number(1, 2))

        @property
        def by_entries(self) -> bool:
            return True

        def default_scale(self, count: int) -> float | None:
            return None

        def holds(self, count: int, matrix: Sides | None) -> float:
            return 3

        def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
            return Merged(vectors.sum([1 / self.factor / vectors.count] * vectors.count), factor=self.factor)

    try:
        base, models = states({**SHAPES, "up.bias_too": (16,)}, 4)  # vectors that follow each other are one
        for factor in (1.0, 2.0):
            recipe, out = fm.Recipe(method=Halved(factor), **options), tmp_path / str(factor)
            fm.merge_checkpoints(base, models, out, recipe, progress=False)
        whole, halved = (load_file(tmp_path / name / "model.safetensors") for name in ("1.0", "2.0"))
        first, second = (fm.analyze(base, models, methods={"mean": Halved(factor)}).total for factor in (1.0, 2.0))
    finally:
        del METHODS["halved"]
    assert all(torch.equal(whole[name], halved[name]) for name in base)
    assert first == second


def test_views_mean_nothing_to_a_method_without_matrices() -> None:
    base, models = states(SHAPES, 2)
    recipe = fm.Recipe(method="average", views=[fm.Split("qkv.weight", 3)])
    assert all(
        torch.equal(tensor, fm.merge(base, models, recipe)[name])
        for name, tensor in fm.merge(base, models, fm.Recipe(method="average")).items()
    )


def test_what_fr_finds_out_is_in_the_manifest(tmp_path: Path) -> None:
    base, models = states(SHAPES, 2)
    fm.merge_checkpoints(base, models, tmp_path / "model", progress=False)
    manifest = json.loads((tmp_path / "model" / "freemerge.json").read_text())
    everything = torch.cat([vectors(base, models, name).flatten(1) for name in base], 1).abs().mean(1)
    assert manifest["recipe"]["method"] == "fr"
    assert manifest["recipe"]["weights"] == "magnitude"
    assert manifest["recipe"]["measured"]["weights"] == pytest.approx((everything / everything.sum()).tolist())
    assert manifest["recipe"]["measured"]["scale"] == 0.8
    assert manifest["tensors"]["up.weight"].keys() == {"action", "removed", "backend", "form", "energy_factor"}
    assert manifest["tensors"]["up.weight"]["energy_factor"] > 1
    assert manifest["tensors"]["up.bias"] == {"action": "merge"}
    assert "FR-Merging, [arXiv 2411.16815]" in (tmp_path / "model" / "README.md").read_text()

    report = fm.merge_checkpoints(base, models, tmp_path / "tensor", fm.Recipe(scope="tensor"), progress=False)
    assert report.weights is None
    manifest = json.loads((tmp_path / "tensor" / "freemerge.json").read_text())
    assert manifest["recipe"]["measured"]["weights"] is None
    for name in base:
        means = vectors(base, models, name).abs().flatten(1).mean(1)
        assert manifest["tensors"][name]["weights"] == pytest.approx((means / means.sum()).tolist())


def test_a_merge_leaves_no_trace_in_the_merger() -> None:
    """Units are independent: any order, and any number of times, gives the same."""
    from freemerge.checkpoint import Checkpoint, Inputs
    from freemerge.merging.engine import Merger

    base, models = states(SHAPES, 2)
    merger = Merger(Inputs(Checkpoint.open(base), [Checkpoint.open(model) for model in models]), fm.Recipe())
    before = {name: id(value) for name, value in vars(merger).items()}
    measured = merger.measure()
    first = [merger.merged(unit, measured) for unit in merger.units]
    again = [merger.merged(unit, measured) for unit in reversed(merger.units)][::-1]
    assert {name: id(value) for name, value in vars(merger).items()} == before
    for one, other in zip(first, again, strict=True):
        assert one.notes == other.notes
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


# A new method


@pytest.fixture
def trimmed_mean() -> Iterator[type[Method]]:
    """A method as somebody else would write it, in the registry while a test runs."""

    @dataclass(frozen=True)
    class TrimmedMean(Method):
        """The mean of the task vectors, entry by entry, without the smallest and largest values."""

        name = "trimmed_mean"
        title = "trimmed mean"
        sees_matrices = False

        trim: float = parameter(0.25, "share of models left out at each end", kind=number(0, 0.49))

        def holds(self, count: int, matrix: Sides | None) -> float:
            return 5 * count  # copies of a tensor; sorting makes some

        def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
            merged = []
            for deltas in zip(*vectors.each(), strict=True):
                ordered = torch.stack(deltas).sort(0).values
                left_out = round(self.trim * len(ordered))
                merged.append(ordered[left_out : len(ordered) - left_out].mean(0))
            return Merged(merged)

    yield TrimmedMean
    del METHODS["trimmed_mean"]


def test_a_new_method_is_everywhere(
    trimmed_mean: type[Method], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, models = states(SHAPES, 4)
    recipe = fm.Recipe(method="trimmed_mean")
    expected = {name: base[name] + vectors(base, models, name).sort(0).values[1:3].mean(0) for name in base}
    merged = fm.merge(base, models, recipe)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name].double(), tensor, rtol=1e-6, atol=1e-6)
        alone = fm.merge_tensors(base[name], [model[name] for model in models], method="trimmed_mean", name=name)
        assert torch.equal(alone, merged[name])

    (tmp_path / "recipe.yaml").write_text(recipe.replace(trim=0).to_yaml())
    untrimmed = fm.Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert untrimmed.trim == 0.0
    assert METHODS["trimmed_mean"] is trimmed_mean

    paths = [str(tmp_path / f"{i}.safetensors") for i in range(5)]
    for path, state in zip(paths, (base, *models), strict=True):
        save_file(state, path)
    out = tmp_path / "out"
    assert main(["merge", *paths, "-o", str(out), "--method", "trimmed_mean", "--trim", "0.25", "--scale", "1"]) == 0
    assert all(torch.equal(t, merged[name]) for name, t in load_file(out / "model.safetensors").items())
    assert capsys.readouterr().out == f"{out}: scale 1\n", "this method has no weights to tell"
    manifest = json.loads((out / "freemerge.json").read_text())
    assert manifest["recipe"]["trim"] == 0.25
    assert "FR-Merging" not in (out / "README.md").read_text()
    assert main(["inspect", *paths, "--recipe", str(tmp_path / "recipe.yaml"), "--trim", "0.5"]) == 2
    assert "--trim must be a number from 0 to 0.49, got '0.5'" in capsys.readouterr().err
    assert main(["inspect", *paths, "--method", "fr", "--trim", "0.2"]) == 2
    assert "method fr has no option --trim" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_annotations_allow_what_is_taken(method: type[Method]) -> None:
    for name, annotation in get_type_hints(method).items():
        if (own := parameters_of(method).get(name)) is not None and get_origin(annotation) is Literal:
            assert set(get_args(annotation)) == set(own.choices), name


def test_a_name_is_taken_once() -> None:
    with pytest.raises(TypeError, match="two methods called 'average'"):
        type("Other", (Method,), {"name": "average"})
    assert METHODS["average"].__name__ == "Average"


def test_every_method_is_ready_without_parameters() -> None:
    for name, method in METHODS.items():
        assert method().name == name
        assert method().title
        assert hash(method()) == hash(method())
        assert method() == method().replace()
