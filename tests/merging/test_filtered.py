"""The filter around a method: the formulas, every way in, and what is written down about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm
from freemerge.cli import main
from freemerge.methods import METHODS
from freemerge.methods.filtered import Filter, Filtered
from freemerge.methods.vectors import TaskVectors
from in_memory import deltas, states
from reference import reference_filter

SHAPES = {"q.weight": (20, 31), "k.weight": (12, 31), "up.weight": (31, 17), "row": (1, 40), "b.bias": (24,)}
OTHERS = [name for name in METHODS if name != "fr"]
RESPONSE = fm.HighPass(0.3)


def by_hand(matrix: Tensor) -> Tensor:
    """The filter in float64, with the norm of what was filtered."""
    result = reference_filter(matrix, RESPONSE)
    return result * (torch.linalg.norm(matrix.double()) / torch.linalg.norm(result))


@pytest.mark.parametrize("method", OTHERS)
def test_before_is_the_method_on_filtered_models(method: str) -> None:
    base, models = states(SHAPES, 3)
    filtered = [
        {name: base[name] + (by_hand(m[name] - t).float() if t.ndim > 1 else m[name] - t) for name, t in base.items()}
        for m in models
    ]
    options: dict[str, Any] = {"compute_dtype": "float64", "out_dtype": "float64"}
    if method == "dare":
        options["drop"] = 0.5
    merged = fm.merge(base, models, fm.Recipe(RESPONSE, method=method, filter="before", **options))
    expected = fm.merge(base, filtered, fm.Recipe(method=method, **options))
    for name, tensor in expected.items():
        if method in ("ties", "pcb", "breadcrumbs"):  # an entry at a threshold may fall on either side
            agree = (merged[name] - tensor).abs() < 1e-5
            assert float(agree.double().mean()) > 0.99
        else:
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", OTHERS)
def test_after_is_the_filter_of_what_the_method_merges(method: str) -> None:
    base, models = states(SHAPES, 3)
    recipe = fm.Recipe(method=method, scale=0.7, compute_dtype="float64", out_dtype="float64")
    plain = fm.merge(base, models, recipe)
    merged = fm.merge(base, models, recipe.replace(filter="after", response=RESPONSE))
    for name, tensor in base.items():
        delta = plain[name] - tensor
        expected = tensor + (by_hand(delta) if tensor.ndim > 1 else delta)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("method", "weights"), [("average", "uniform"), ("task_arithmetic", "sum")])
def test_fr_is_a_weighted_sum_that_is_filtered_after(method: str, weights: str) -> None:
    base, models = states(SHAPES, 3)
    fr = fm.merge(base, models, fm.Recipe(RESPONSE, weights=weights, scale=0.4))
    after = fm.merge(base, models, fm.Recipe(RESPONSE, method=method, filter="after", scale=0.4))
    assert all(torch.equal(tensor, after[name]) for name, tensor in fr.items())


@pytest.mark.parametrize("method", [name for name in OTHERS if name not in ("breadcrumbs", "model_stock")])  # by tensor
@pytest.mark.parametrize("when", ["before", "after"])
def test_views_are_what_is_filtered(method: str, when: Any) -> None:
    base, models = states(SHAPES, 3)
    recipe = fm.Recipe(RESPONSE, method=method, filter=when, scale=1.0, **({"drop": 0.0} if method == "dare" else {}))
    if "scope" in recipe.to_config():
        recipe = recipe.replace(scope="model")
    names = ("q.weight", "k.weight")
    stacked = fm.merge(
        {n: base[n] for n in names},
        [{n: m[n] for n in names} for m in models],
        recipe.replace(views=[fm.Stack(("q.*", "k.*"))]),
    )
    fused = fm.merge(
        {"qk": torch.cat([base[n] for n in names])}, [{"qk": torch.cat([m[n] for n in names])} for m in models], recipe
    )["qk"]
    torch.testing.assert_close(torch.cat([stacked[n] for n in names]), fused, rtol=0, atol=1e-6)
    split = fm.merge(
        {"qk": torch.cat([base[n] for n in names])},
        [{"qk": torch.cat([m[n] for n in names])} for m in models],
        recipe.replace(views=[fm.Split("qk", (20, 12))]),
    )["qk"]
    assert not torch.equal(split, fused)


def test_every_look_at_filtered_task_vectors_is_filtered() -> None:
    """Also those of a method that reads its members one by one."""
    q, k = torch.zeros(6, 10), torch.zeros(5, 10)
    generator = torch.Generator().manual_seed(0)
    qs, ks = ([torch.randn(t.shape, generator=generator) for _ in range(2)] for t in (q, k))
    vectors = TaskVectors((deltas("q", q, qs, []), deltas("k", k, ks, [])), True)
    seen = Filtered(fm.methods.Average(), Filter("before", RESPONSE))._seen(vectors)
    expected = [by_hand(torch.cat(pair)).split([6, 5]) for pair in zip(qs, ks, strict=True)]
    for member in (0, 1):
        tensor, own = seen.tensors[member], [parts[member].float() for parts in expected]
        torch.testing.assert_close(list(tensor.each()), own)
        torch.testing.assert_close(tensor.sum([1.0, -2.0]), own[0] - 2 * own[1])
        torch.testing.assert_close(seen.sum([1.0, -2.0])[member], own[0] - 2 * own[1])
        assert tensor.means() == pytest.approx([float(part.abs().mean()) for part in own])


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_scale_is_that_of_what_is_merged(when: Any, tmp_path: Path) -> None:
    base, models = states(SHAPES, 3)
    report = fm.merge_checkpoints(
        base, models, tmp_path / "out", fm.Recipe(RESPONSE, method="iso_c", filter=when), progress=False
    )
    unscaled = fm.merge(base, models, fm.Recipe(RESPONSE, method="iso_c", filter=when, scale=1.0, out_dtype="float64"))
    square = overlap = 0.0
    see: Callable[[Tensor], Tensor] = by_hand if when == "before" else Tensor.double
    for name, tensor in base.items():
        vectors = [see(m[name] - tensor) if tensor.ndim > 1 else (m[name] - tensor).double() for m in models]
        square += sum(float(v.square().sum()) for v in vectors)
        overlap += float(((unscaled[name] - tensor.double()) * torch.stack(vectors).sum(0)).sum())
    assert report.scale == pytest.approx(square / overlap, rel=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["iso_c", "ties"])
def test_command_line_recipe_and_manifest(when: Any, method: str, tmp_path: Path) -> None:
    base, models = states(SHAPES, 2)
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    for path, state in zip(paths, (base, *models), strict=True):
        save_file(state, path)
    recipe = fm.Recipe(RESPONSE, method=method, filter=when)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    options = ["--method", method, "--filter", when, "--cutoff", "0.3"]
    assert main(["merge", *paths, "-o", str(tmp_path / "a"), *options]) == 0
    assert main(["merge", *paths, "-o", str(tmp_path / "b"), "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["merge", *paths, "-o", str(tmp_path / "c"), *options, "--filter", "none"]) == 2
    expected = fm.merge(base, models, recipe)
    for out in ("a", "b"):
        written = load_file(tmp_path / out / "model.safetensors")
        assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())
    manifest = json.loads((tmp_path / "a" / "freemerge.json").read_text())
    assert manifest["recipe"]["filter"] == when
    assert manifest["recipe"]["response"]["cutoff"] == 0.3
    assert manifest["tensors"]["up.weight"]["removed"] > 0
    assert ("energy_factor" in manifest["tensors"]["up.weight"]) == (when == "after")
    decision = {d.name: d for d in fm.inspect(base, models, recipe).decisions}
    assert decision["up.weight"].action == "filter"
    assert decision["up.weight"].removed == manifest["tensors"]["up.weight"]["removed"]
    assert decision["b.bias"].removed is None
    one = fm.merge_tensors(base["up.weight"], [m["up.weight"] for m in models], recipe=recipe.replace(scale=1.0))
    own = {"up.weight": base["up.weight"]}, [{"up.weight": m["up.weight"]} for m in models]
    assert torch.equal(one, fm.merge(*own, recipe.replace(scale=1.0))["up.weight"])


def test_recipes_hold_it() -> None:
    recipe = fm.Recipe(method="iso_c", filter="before", cutoff=0.2)
    assert recipe == fm.Recipe(fm.HighPass(0.2), method="iso_c", filter="before")
    assert recipe == fm.Recipe(method="iso_c", filter=Filter("before", fm.HighPass(0.2)))
    assert recipe.replace(filter="after").filter == Filter("after", fm.HighPass(0.2))
    assert recipe.replace(cutoff=0.1).filter == Filter("before", fm.HighPass(0.1))
    assert recipe.replace(filter=None) == fm.Recipe(method="iso_c")
    assert recipe.replace(method="tsv_m").filter == recipe.filter
    assert fm.Recipe.from_config(recipe.to_config()) == recipe
    assert fm.Recipe.from_config({"method": "ties", "filter": "after"}).filter == Filter("after", fm.HighPass(0.4))
    assert "filter" not in fm.Recipe(method="iso_c").to_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "before"}, "filter: method fr filters by itself"),
        ({"method": "iso_c", "filter": "during"}, "filter must be one of None, 'before', 'after', got 'during'"),
        ({"method": "iso_c", "filter": "after", "response": 3}, "response must be a frequency response"),
        ({"method": "iso_c", "filter": "after", "cutoff": -1}, "cutoff must be"),
        ({"method": "iso_c", "cutoff": 0.2}, "cutoff: method iso_c has no filter of its own; filter='before'"),
    ],
)
def test_errors_name_the_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        fm.Recipe(**options)
