"""TIES, DARE, PCB, Model Breadcrumbs and Model Stock against their papers' formulas, written out in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import freemerge as fm
from formulas import agreeing, breadcrumbs, model_stock, pcb, ties

State = dict[str, Tensor]
Array = npt.NDArray[np.float64]
SHAPES = {
    "wide.weight": (4, 30),
    "tall.weight": (21, 5),
    "norm.bias": (7,),
    "conv.weight": (3, 2, 3, 3),
    "none": (0, 4),
}


def states(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    models = [
        {n: (t + 0.1 * (i + 1) * torch.randn(t.shape, generator=generator)).to(dtype) for n, t in base.items()}
        for i in range(count)
    ]
    return base, models


def vectors(base: State, models: list[State], names: list[str]) -> list[Array]:
    """The task vectors as the engine sees them, one flat float64 array a model."""
    return [np.concatenate([(m[n].float() - base[n].float()).double().numpy().ravel() for n in names]) for m in models]


def check(recipe: fm.Recipe, base: State, models: list[State], formula: Any) -> None:
    """Compare a merge with a formula of the task vectors of the model, or of each tensor."""
    merged = fm.merge(base, models, recipe.replace(scale=1.0, out_dtype="float32"))
    groups = [list(base)] if getattr(recipe.method, "scope", "tensor") == "model" else [[name] for name in base]
    for names in groups:
        actual = np.concatenate([(merged[n].double() - base[n].double()).numpy().ravel() for n in names])
        np.testing.assert_allclose(actual, formula(vectors(base, models, names)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize(
    ("count", "density", "dtype"),
    [
        (1, 0.2, torch.float32),
        (2, 0.5, torch.bfloat16),
        (3, 0.3, torch.float32),
        (5, 1.0, torch.bfloat16),
        (4, 0, None),
    ],
)
def test_ties(count: int, density: float, dtype: torch.dtype | None, scope: str) -> None:
    check(
        fm.Recipe(method="ties", density=density, scope=scope),
        *states(count, dtype or torch.float32),
        lambda v: ties(v, density),
    )


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (2.0, 0.0, 1.0), (0.7, -0.4, 0.1), (0.0, 0.0, 0.0)])
def test_ties_with_weights(weights: tuple[float, ...], scope: str) -> None:
    recipe = fm.Recipe(method="ties", density=0.6, scope=scope, weights=weights)
    check(recipe, *states(3), lambda v: ties(v, 0.6, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight", [0.1, 1 / 3, 7.0])
def test_ties_with_equal_weights_is_the_papers_to_the_byte(weight: float, dtype: torch.dtype) -> None:
    base, models = states(3, dtype)
    plain = fm.merge(base, models, fm.Recipe(method="ties"))
    weighted = fm.merge(base, models, fm.Recipe(method="ties", weights=[weight] * 3))
    assert all(torch.equal(tensor, weighted[name]) for name, tensor in plain.items())
    turned = fm.merge(base, models, fm.Recipe(method="ties", weights=[-weight] * 3, scale=-1))
    assert all(torch.equal(tensor, turned[name]) for name, tensor in plain.items())


def test_ties_by_hand() -> None:
    base = torch.zeros(5)
    models = [torch.tensor([4.0, 3.0, 0.1, -2.0, 2.0]), torch.tensor([-1.0, 5.0, 0.2, -6.0, -2.0])]
    recipe = fm.Recipe(method="ties", density=0.8, scale=1)
    assert fm.merge_tensors(base, models, recipe=recipe).tolist() == [4.0, 4.0, 0.0, -4.0, 0.0]
    assert fm.merge_tensors(base, models, method="ties").tolist() == [4.0, 0.0, 0.0, -6.0, 0.0]
    # 3 * 2 outweighs -2, and 4 and 5 count three times as much as the rest
    weighted = fm.merge_tensors(base, models, recipe=recipe, weights=[3, 1])
    torch.testing.assert_close(weighted, torch.tensor([4.0, 3.5, 0.0, -3.0, 2.0]))


@pytest.mark.parametrize(
    ("count", "beta", "gamma", "dtype"),
    [
        (1, 0.85, 0.007, torch.float32),
        (3, 0.5, 0.1, torch.float32),
        (4, 0.3, 0.2, torch.bfloat16),
        (2, 0.0, 0.0, torch.float64),
        (2, 0.6, 0.5, torch.float32),
        (2, 1.0, 0.0, torch.float32),
    ],
)
def test_breadcrumbs(count: int, beta: float, gamma: float, dtype: torch.dtype) -> None:
    recipe = fm.Recipe(method="breadcrumbs", beta=beta, gamma=gamma)
    check(recipe, *states(count, dtype), lambda v: breadcrumbs(v, beta, gamma))


@pytest.mark.parametrize("method", ["breadcrumbs", "ties", "pcb"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 71, 72])
def test_of_a_tensor_however_small_something_is_merged(method: str, count: int) -> None:
    """Such as a logit scale, a gate or the bias of two classes, of which round(.15 n) entries are none."""
    base = torch.zeros(count)
    models = [torch.arange(1.0, count + 1), torch.arange(count, 0, -1.0)]
    scope = {} if method == "breadcrumbs" else {"scope": "tensor"}
    merged = fm.merge_tensors(base, models, recipe=fm.Recipe(method=method, scale=1.0, **scope))
    assert merged.any()
    if count == 1:
        assert merged.item() == (2.0 if method == "breadcrumbs" else 1.0)


def test_of_outliers_something_is_left() -> None:
    """Shares of which one rounds up, and the other down to as many entries."""
    for count in range(1, 80):
        model = torch.arange(1.0, count + 1)
        recipe = fm.Recipe(method="breadcrumbs", beta=0.99, gamma=0.009, scale=1.0)
        merged = fm.merge_tensors(torch.zeros(count), [model], recipe=recipe)
        assert merged.count_nonzero() == 1, count
    nothing = fm.Recipe(method="breadcrumbs", beta=0.5, gamma=0.5, scale=1.0)
    assert not fm.merge_tensors(torch.zeros(9), [torch.ones(9)], recipe=nothing).any()


def test_breadcrumbs_by_hand() -> None:
    models = [torch.tensor([4.0, -3.0, 0.1, -2.0, 2.0]), torch.tensor([-1.0, 5.0, 0.2, -6.0, -2.0])]
    recipe = fm.Recipe(method="breadcrumbs", beta=0.4, gamma=0.2, weights=[1, 10])
    # of the first 4 is an outlier, and 2 is kept twice: both are equal to the smallest that is kept
    assert fm.merge_tensors(torch.zeros(5), models, recipe=recipe).tolist() == [0.0, 47.0, 0.0, -2.0, -18.0]
    assert fm.Recipe(method="breadcrumbs").global_scale(3) == 0.4


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("common", [0.0, 1.0])
def test_model_stock(count: int, common: float) -> None:
    base, models = states(count, torch.float64)
    shared, _ = states(0, seed=1)
    models = [{name: tensor + common * shared[name] for name, tensor in model.items()} for model in models]
    check(fm.Recipe(method="model_stock", compute_dtype="float64"), base, models, model_stock)


def test_model_stock_by_hand() -> None:
    def merged(*models: list[float]) -> list[float]:
        tensors = [torch.tensor(model) for model in models]
        return fm.merge_tensors(torch.ones(2), [1 + tensor for tensor in tensors], method="model_stock").tolist()  # type: ignore[no-any-return]

    assert merged([4.0, 0.0], [2.0, 0.0]) == [4.0, 1.0], "the mean of what is parallel"
    assert merged([4.0, 0.0], [0.0, 4.0]) == [1.0, 1.0], "the base, where they are orthogonal"
    assert merged([4.0, 0.0], [-4.0, 0.0]) == [1.0, 1.0], "and where they cancel"
    assert merged([4.0, 0.0], [0.0, 0.0]) == [1.0, 1.0]
    assert merged([3.0, 4.0], [4.0, 3.0]) == pytest.approx([1 + 3.5 * 48 / 49] * 2), "cos 24/25, t = 48/49"
    tiny = merged([3e-5, 4e-5], [4e-5, 3e-5])
    assert [value - 1 for value in tiny] == pytest.approx([3.5e-5 * 48 / 49] * 2, rel=0.01), "however small"


@pytest.mark.parametrize("exponent", [-54, 40])
def test_pcb_keeps_the_same_entries_of_small_and_large_task_vectors(exponent: int) -> None:
    base, models = states(3)
    tasks = [model["wide.weight"] - base["wide.weight"] for model in models]
    recipe = fm.Recipe(method="pcb", scale=1.0)
    merged = fm.merge_deltas([2.0**exponent * task for task in tasks], recipe=recipe)
    torch.testing.assert_close(merged * 2.0**-exponent, fm.merge_deltas(tasks, recipe=recipe), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_magnitudes_that_float32_cannot_compare_are_refused(method: str) -> None:
    tasks = [1e60 * torch.randn(40, 30, dtype=torch.float64) for _ in range(2)]
    with pytest.raises(fm.CheckpointError, match=r"'q': magnitudes are compared in float32, which \d.*e\+60 overflows"):
        fm.merge_deltas(tasks, method=method, name="q")


def test_model_stock_of_any_size() -> None:
    """One over the length of a denormal task vector is more than float32 holds."""
    vectors = [torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.0])]
    whole = fm.merge_deltas(vectors, method="model_stock")
    tiny = fm.merge_deltas([1e-40 * vector for vector in vectors], method="model_stock")
    torch.testing.assert_close(tiny * 2.0**100 / 1e-40, whole * 2.0**100, rtol=1e-3, atol=0)


def test_model_stock_says_its_ratios_and_takes_two_models(tmp_path: Path) -> None:
    base, models = {"w": torch.zeros(2)}, [{"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([4.0, 3.0])}]
    recipe = fm.Recipe(method="model_stock")
    fm.merge_checkpoints(base, models, tmp_path / "out", recipe, progress=False)
    manifest = json.loads((tmp_path / "out" / "freemerge.json").read_text())
    assert manifest["tensors"]["w"]["ratio"] == pytest.approx(48 / 49)
    for call in (fm.merge, fm.inspect, lambda *inputs: fm.analyze(*inputs[:2], methods=["model_stock"])):
        with pytest.raises(fm.ArgumentError, match="method model_stock takes at least 2 models"):
            call(base, models[:1], recipe)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize(
    ("count", "density", "dtype"),
    [
        (1, 0.1, torch.float32),
        (2, 0.4, torch.bfloat16),
        (3, 0.4, torch.float32),
        (5, 1.0, torch.bfloat16),
        (4, 0, None),
    ],
)
def test_pcb(count: int, density: float, dtype: torch.dtype | None, scope: str) -> None:
    recipe = fm.Recipe(method="pcb", density=density, scope=scope, compute_dtype="float64")
    check(recipe, *states(count, dtype or torch.float32), lambda v: pcb(v, density))


@pytest.mark.parametrize("count", [110, 210])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_pcb_where_float32_has_no_exponentials(count: int, scope: str) -> None:
    """exp(-K) is the score of a small entry."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(9, 11, generator=generator) for _ in range(count)]
    merged = fm.merge_deltas(vectors, recipe=fm.Recipe(method="pcb", scope=scope, scale=1.0)).double().numpy().ravel()
    expected = pcb([vector.double().numpy().ravel() for vector in vectors])
    np.testing.assert_allclose(merged, expected, rtol=1e-3, atol=1e-4)
    signs = [vector.sign() * (i % 3) for i, vector in enumerate(vectors)]  # all products of one with itself are equal
    recipe = fm.Recipe(method="pcb", scope=scope, density=1.0, scale=1.0)
    merged = fm.merge_deltas(signs, recipe=recipe).double().numpy().ravel()
    expected = pcb([vector.double().numpy().ravel() for vector in signs], density=1.0)
    np.testing.assert_allclose(merged, expected, rtol=1e-3, atol=1e-4)


def test_pcb_of_many_models() -> None:
    base, models = states(120)
    merged = fm.merge(base, models, fm.Recipe(method="pcb"))
    for name, tensor in merged.items():
        deltas = torch.stack([model[name] - base[name] for model in models])
        assert (tensor - base[name] <= deltas.amax(0).clamp(min=0) + 1e-5).all(), "an average"
        assert (tensor - base[name] >= deltas.amin(0).clamp(max=0) - 1e-5).all()


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_pcb_where_products_overflow(scope: str) -> None:
    base, models = states(3)
    huge = [{name: 1e25 * tensor for name, tensor in model.items()} for model in models]
    with pytest.raises(fm.CheckpointError, match="products overflow"):
        fm.merge(base, huge, fm.Recipe(method="pcb", scope=scope))
    empty = {"none": torch.zeros(0, 4)}
    assert fm.merge(empty, [empty], fm.Recipe(method="pcb", scope=scope))["none"].shape == (0, 4)


@pytest.mark.parametrize("method", ["ties", "pcb", "dare", "breadcrumbs", "model_stock"])
def test_task_vectors_of_zero(method: str) -> None:
    base, (model,) = states(1)
    assert all(torch.equal(t, base[n]) for n, t in fm.merge(base, [base, base], fm.Recipe(method=method)).items())
    merged = fm.merge(base, [base, model], fm.Recipe(method=method))
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())


def test_dare_keeps_rescaled_entries_and_the_expectation() -> None:
    base, models = torch.zeros(50, 40), [torch.ones(50, 40), torch.full((50, 40), 3.0)]

    def merged(**options: Any) -> Tensor:
        return fm.merge_tensors(base, models, recipe=fm.Recipe(method="dare", scale=1, **options))

    entries = merged(drop=0.75)
    assert sorted(entries.unique().tolist()) == [0.0, 4.0, 12.0, 16.0], "each model drops entries of its own"
    assert float((entries % 12 == 4).double().mean()) == pytest.approx(0.25, abs=0.05)  # 5 sigma
    assert float((entries >= 12).double().mean()) == pytest.approx(0.25, abs=0.05)
    assert torch.equal(entries, merged(drop=0.75))
    assert not torch.equal(entries, merged(drop=0.75, seed=1))
    assert torch.equal(merged(drop=0), torch.full((50, 40), 4.0))
    assert torch.equal(merged(drop=0, weights=[2.0, -1.0]), torch.full((50, 40), -1.0))


@pytest.mark.parametrize("weights", ["sum", (0.7, -0.3, 0.2)])
def test_dare_elects_signs_of_what_it_did_not_drop(weights: Any) -> None:
    """Each alone says what is dropped: the same as without an election."""
    base, models = states(3)
    recipe = fm.Recipe(method="dare", drop=0.5, seed=4, scale=1.0, out_dtype="float64")
    lambdas = (1.0, 1.0, 1.0) if weights == "sum" else weights
    alone = [
        fm.merge(base, models, recipe.replace(weights=[w if i == j else 0.0 for j in range(3)]))
        for i, w in enumerate(lambdas)
    ]
    elected = fm.merge(base, models, recipe.replace(sign_election=True, weights=weights))
    kept = 0
    for name, tensor in base.items():
        vectors = np.array([(merged[name] - tensor.double()).numpy() for merged in alone])
        np.testing.assert_allclose(
            (elected[name] - tensor.double()).numpy(), (vectors * agreeing(vectors)).sum(0), rtol=1e-5, atol=1e-6
        )
        kept += int((vectors != 0).sum())
    assert kept == pytest.approx(1.5 * sum(tensor.numel() for tensor in base.values()), rel=0.2)


@pytest.mark.parametrize("weight", [1 / 3, 0.1, 0.7])
def test_dare_elects_no_sign_where_equally_weighted_entries_cancel(weight: float) -> None:
    ones = torch.arange(1.0, 100.0)
    base, models = {"w": torch.zeros(99)}, [{"w": ones}, {"w": 4 * ones}, {"w": -5 * ones}]
    recipe = fm.Recipe(method="dare", drop=0.3, scale=1.0, weights=[weight] * 3)
    alone = [fm.merge(base, models, recipe.replace(weights=[float(i == j) for j in range(3)]))["w"] for i in range(3)]
    all_kept = torch.stack(alone).all(0)
    assert 0 < int(all_kept.sum()) < 99
    assert not fm.merge(base, models, recipe.replace(sign_election=True))["w"][all_kept].any()


def test_dare_without_drops_elects_the_signs_of_the_sum() -> None:
    models = [torch.tensor([4.0, 3.0, -2.0, 1.0]), torch.tensor([-1.0, 5.0, 2.0, -3.0])]
    recipe = fm.Recipe(method="dare", drop=0, sign_election=True, scale=1)
    assert fm.merge_tensors(torch.zeros(4), models, recipe=recipe).tolist() == [4.0, 8.0, 0.0, -3.0]
    assert fm.merge_tensors(torch.zeros(4), models, recipe=recipe, weights=[1, 5]).tolist() == [-5.0, 28.0, 10.0, -15.0]
    assert recipe.method.linear is False
    assert fm.Recipe(method="dare", sign_election=True).global_scale(2) == 0.4


@pytest.mark.parametrize("method", ["ties", "pcb", "dare", "breadcrumbs", "model_stock"])
def test_order_threads_and_layout_do_not_matter(method: str) -> None:
    base, models = states(3)
    base["big"] = torch.zeros(300, 400)
    for i, model in enumerate(models):
        model["big"] = torch.randn(300, 400, generator=torch.Generator().manual_seed(i))
    recipe = fm.Recipe(method=method)
    merged = fm.merge(base, models, recipe)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = fm.merge(base, models, recipe)
    finally:
        torch.set_num_threads(threads)
    transposed = [
        {name: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor for name, tensor in model.items()}
        for model in models
    ]
    for other in (alone, fm.merge(base, transposed, recipe)):
        assert all(torch.equal(tensor, other[name]) for name, tensor in merged.items())
    if method == "dare":  # the sums of the others are over the model, in its order
        backwards = fm.merge(dict(reversed(base.items())), models, recipe)
        assert all(torch.equal(tensor, backwards[name]) for name, tensor in merged.items())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((name, {}) for name in ("ties", "pcb", "dare", "emr")),
        *((name, {"scope": "tensor"}) for name in ("ties", "pcb")),
        ("dare", {"sign_election": True, "drop": 0.3}),
    ],
)
def test_pieces_give_what_the_whole_gives(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = states(3)
    recipe = fm.Recipe(method=method, **options)
    whole = fm.merge(base, models, recipe)
    monkeypatch.setattr("freemerge.methods.vectors.PIECE", 37)
    for name, tensor in fm.merge(base, models, recipe).items():
        if method == "pcb":  # sums of exponentials over pieces differ in their last bits
            torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6)
        else:
            assert torch.equal(tensor, whole[name])


def test_dare_goes_by_the_tensors_name() -> None:
    base, models = {name: torch.zeros(40) for name in "ab"}, [{name: torch.ones(40) for name in "ab"}]
    merged = fm.merge(base, models, fm.Recipe(method="dare", drop=0.5))
    assert not torch.equal(merged["a"], merged["b"])


@pytest.mark.parametrize("method", ["ties", "pcb", "dare", "breadcrumbs", "model_stock"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(method: str, bad: float) -> None:
    base, models = states(2)
    models[1]["tall.weight"][3, 2] = bad
    with pytest.raises(fm.CheckpointError, match=r"tall\.weight"):
        fm.merge(base, models, fm.Recipe(method=method))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ties", "density": 1.5}, "density must be a number from 0 to 1"),
        ({"method": "ties", "scope": "row"}, "scope must be one of"),
        ({"method": "pcb", "density": -1}, "density must be"),
        ({"method": "ties", "weights": "sum"}, "weights must be 'uniform' or a list of finite numbers"),
        ({"method": "breadcrumbs", "beta": 1.5}, "beta must be a number from 0 to 1"),
        ({"method": "dare", "sign_election": 1}, "sign_election must be true or false"),
        ({"method": "dare", "drop": 1}, "drop must be a number from 0 to 0.9999"),
        ({"method": "dare", "seed": 1.5}, "seed must be a whole number >= 0, got 1.5"),
        ({"method": "dare", "seed": True}, "seed must be"),
        ({"method": "dare", "seed": -1}, "seed must be"),
    ],
)
def test_errors_name_the_parameter(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        fm.Recipe(**options)
