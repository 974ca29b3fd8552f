"""Scale "interference" against its formula in float64, what it is where it is known, and what it costs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import freemerge as fm
from freemerge.merging.run import inspect
from freemerge.methods import METHODS

State = dict[str, Tensor]
SHAPES = {
    "a.weight": (12, 20),
    "b.weight": (9, 7),
    "stack": (3, 16, 18),
    "conv.kernel": (6, 4, 3, 3),
    "conv.line": (5, 20, 17),
    "row": (1, 30),
    "a.bias": (12,),
    "b.bias": (9,),
}


def models(count: int, shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> tuple[State, list[State]]:
    """A base and models whose task vectors have something in common."""
    generator = torch.Generator().manual_seed(seed)

    def state(size: float) -> State:
        return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    base, common = state(1.0), state(0.05)
    return base, [
        {name: base[name] + common[name] + own for name, own in state(0.1 * (i + 1)).items()} for i in range(count)
    ]


def maps(name: str, tensor: Tensor) -> list[Tensor]:
    """A matrix, those of a stack, or what a convolution multiplies patches with."""
    return [tensor.flatten(1)] if tensor.ndim == 2 or "conv" in name else list(tensor)


EMPHASISED = ("average", "task_arithmetic", "dare", "ties", "breadcrumbs", "pcb", "emr")
STRENGTHENED = {"fr": 1.2, "ties": 1.2, "breadcrumbs": 1.2, "pcb": 1.4, "tsv_m": 1.7}


def formula(base: State, others: list[State], merged: State, method: str) -> float:
    """The scale "interference" of what a method merges at scale 1."""
    least, cosine = least_interference(base, others, merged)
    plain = fm.merge(base, others, fm.Recipe(method="task_arithmetic", scale=1.0, out_dtype="float64"))
    tasks = len(others) * least_interference(base, others, plain)[0]
    bounds = min(1.0, max(1 / tasks, tasks / len(others))), max(1.0, len(others) / tasks)
    emphasis = min(max(math.sqrt(tasks / 2.2), bounds[0]), bounds[1]) if method in EMPHASISED else 1.0
    return STRENGTHENED.get(method, 1.0) * emphasis * (cosine if method == "wudi" else 1.0) * least


def least_interference(base: State, others: list[State], merged: State) -> tuple[float, float]:
    """The scale of least interference, and the cosine between what is left of the tasks and the tasks."""
    gain = cost = alone = 0.0
    for name, weights in base.items():
        if weights.ndim < 2:
            continue
        x = merged[name].double() - weights.double()
        for other in others:
            v = other[name].double() - weights.double()
            for x_own, v_own in zip(maps(name, x), maps(name, v), strict=True):
                whole = float(v.square().sum()) ** 2  # a stack counts once
                gain += float(((x_own @ v_own.T) * (v_own @ v_own.T)).sum()) / whole
                cost += float((x_own @ v_own.T).square().sum()) / whole
                alone += float((v_own @ v_own.T).square().sum()) / whole
    return gain / cost, gain / math.sqrt(cost * alone)


def found(base: State, others: list[State], out: Path, **options: object) -> float:
    recipe = fm.Recipe(scale="interference", **options)  # type: ignore[arg-type]
    return fm.merge_checkpoints(base, others, out, recipe, progress=False).scale


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dare"])
def test_the_formula(method: str, tmp_path: Path) -> None:
    base, others = models(3)
    merged = fm.merge(base, others, fm.Recipe(method=method, scale=1.0, out_dtype="float64"))
    scale = found(base, others, tmp_path / "out", method=method)
    assert scale == pytest.approx(formula(base, others, merged, method), rel=2e-5)
    manifest = json.loads((tmp_path / "out" / "freemerge.json").read_text())
    assert manifest["recipe"]["scale"] == "interference"
    assert manifest["recipe"]["measured"]["scale"] == scale
    again = fm.merge(base, others, fm.Recipe(method=method, scale=scale))
    at_once = fm.merge(base, others, fm.Recipe(method=method, scale="interference"))
    assert all(torch.equal(again[name], at_once[name]) for name in base)


@pytest.mark.parametrize("elected", [False, True])
def test_of_dare_it_is_that_of_the_mean_over_its_drops(elected: bool, tmp_path: Path) -> None:
    base, others = models(3)
    merged = fm.merge(base, others, fm.Recipe(method="task_arithmetic", scale=1.0, out_dtype="float64"))
    scale = found(base, others, tmp_path / "out", method="dare", drop=0.5, sign_election=elected)
    assert scale == pytest.approx(formula(base, others, merged, "dare"), rel=2e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_with_a_filter_around_the_method(when: str, tmp_path: Path) -> None:
    base, others = models(3)
    options = {"method": "ties", "filter": when, "cutoff": 0.2}
    merged = fm.merge(base, others, fm.Recipe(scale=1.0, out_dtype="float64", **options))  # type: ignore[arg-type]
    seen = others
    if when == "before":  # the method sees task vectors that are filtered and keep their norm: a merge of each alone
        alone = fm.Recipe(method="average", filter="after", cutoff=0.2, out_dtype="float64")
        seen = [fm.merge(base, [other], alone) for other in others]
    assert found(base, others, tmp_path / "out", **options) == pytest.approx(
        formula(base, seen, merged, "ties"), rel=1e-4
    )


def test_with_a_filter_after_dare_it_is_that_of_the_filtered_mean(tmp_path: Path) -> None:
    base, others = models(3)
    plain, dropped = (
        found(base, others, tmp_path / name, method=name, filter="after", cutoff=0.2)
        for name in ("task_arithmetic", "dare")
    )
    assert dropped == plain


def test_where_it_is_known(tmp_path: Path) -> None:
    base, (one, two) = models(2)
    assert found(base, [one], tmp_path / "one", method="task_arithmetic") == pytest.approx(1)
    assert found(base, [one, one, one], tmp_path / "same", method="task_arithmetic") == pytest.approx(1 / 3, rel=1e-5)
    assert found(base, [one, two], tmp_path / "two", method="average") > 1
    apart = {"w": torch.zeros(6, 8)}
    left, right = torch.randn(6, 8), torch.randn(6, 8)
    left[:, 4:], right[:, :4] = 0, 0  # tasks whose inputs have nothing in common do not interfere
    assert found(apart, [{"w": left}, {"w": right}], tmp_path / "apart", method="task_arithmetic") == pytest.approx(1)
    patches = {"conv": torch.zeros(6, 4, 3, 3)}
    above, below = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    above[:, :, 1:], below[:, :, :1] = 0, 0  # nor do those of a convolution that look at other pixels of a patch
    scale = found(patches, [{"conv": above}, {"conv": below}], tmp_path / "patches", method="task_arithmetic")
    assert scale == pytest.approx(1)


@pytest.mark.parametrize(
    ("own", "emphasis"),
    [(0, 1), (0.5, 0.85), (1, math.sqrt(1.6 / 2.2)), (2, math.sqrt(2.5 / 2.2)), (4, 4 / 3.4), (1e3, 1)],
)
def test_emphasis_is_between_average_and_sum(own: float, emphasis: float, tmp_path: Path) -> None:
    """Four tasks whose rows are the same in one block and ``own`` times that in another, which no other task has."""
    base, others = {"w": torch.zeros(6, 30)}, []
    common = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    for i in range(4):
        vector = torch.zeros(6, 30)
        vector[:, :6], vector[:, 6 * (i + 1) : 6 * (i + 2)] = common, own * common
        others.append({"w": vector})
    scale = found(base, others, tmp_path / "out", method="task_arithmetic")
    assert scale == pytest.approx(emphasis * (1 + own**2) / (4 + own**2), rel=1e-5)


def test_where_the_weights_say_nothing(tmp_path: Path) -> None:
    base, (one,) = models(1)
    assert found(base, [base, base], tmp_path / "same", method="task_arithmetic") == 1
    vector = {"a.bias": base["a.bias"]}
    assert found(vector, [{"a.bias": one["a.bias"]}], tmp_path / "vector", method="task_arithmetic") == 1
    opposite = {name: 2 * base[name] - one[name] for name in base}
    assert found(base, [one, opposite], tmp_path / "opposite", method="task_arithmetic") == 1


def test_some_rows_tell_of_all(tmp_path: Path) -> None:
    base, others = models(3, {f"{i}.weight": (700, 90) for i in range(4)})
    merged = fm.merge(base, others, fm.Recipe(method="task_arithmetic", scale=1.0))
    scale = found(base, others, tmp_path / "out", method="task_arithmetic")
    assert scale == pytest.approx(formula(base, others, merged, "task_arithmetic"), rel=0.03)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_of_any_size(size: float, tmp_path: Path) -> None:
    """Fourth powers of the task vectors would overflow, or vanish."""
    base, others = models(3)
    expected = found(base, others, tmp_path / "of-one", method="task_arithmetic")

    def sized(state: State) -> State:
        return {name: size * (weights.double() - base[name].double()) for name, weights in state.items()}

    scale = found(sized(base), [sized(other) for other in others], tmp_path / "sized", method="task_arithmetic")
    assert scale == pytest.approx(expected, rel=1e-5)


def test_random_drops_do_not_count(tmp_path: Path) -> None:
    base, others = models(3)
    kept, dropped = (found(base, others, tmp_path / name, method=name) for name in ("task_arithmetic", "dare"))
    assert dropped == kept


def test_what_is_read() -> None:
    base, others = models(2)
    nbytes = 3 * sum(tensor.nbytes for tensor in base.values())
    matrices = 3 * sum(tensor.nbytes for tensor in base.values() if tensor.ndim > 1)
    for method, before in (("task_arithmetic", 0), ("fr", nbytes)):
        known = inspect(base, others, fm.Recipe(method=method))
        measured = inspect(base, others, fm.Recipe(method=method, scale="interference"))
        assert known.read_bytes == before + nbytes
        assert measured.read_bytes == known.read_bytes + 2 * matrices
        assert measured.passes == known.passes + 1
        assert measured.memory_bytes > known.memory_bytes


def test_it_is_a_scale_of_the_whole_model() -> None:
    base, others = models(2)
    recipe = fm.Recipe(scale="interference")
    with pytest.raises(fm.ArgumentError, match="scale: method fr finds it over the whole model"):
        fm.task_weights(base, others, recipe)
    alone = fm.merge_tensors(
        base["a.weight"], [other["a.weight"] for other in others], recipe=recipe, weights=[0.5, 0.5]
    )
    only = {"a.weight": base["a.weight"]}, [{"a.weight": other["a.weight"]} for other in others]
    assert torch.equal(alone, fm.merge(*only, fm.Recipe(scale="interference", weights=[0.5, 0.5]))["a.weight"])
    with pytest.raises(fm.ArgumentError, match="layers: scale must be a number or auto"):
        fm.Recipe(method="task_arithmetic", weights=[1, 1], scale="interference", layers=[("*", [0.5, 0.5])])


def test_a_value_that_is_not_finite_is_named() -> None:
    base, others = models(2)
    others[1]["b.weight"][2, 3] = math.nan
    with pytest.raises(fm.CheckpointError, match=r"b\.weight"):
        fm.merge(base, others, fm.Recipe(method="task_arithmetic", scale="interference"))
