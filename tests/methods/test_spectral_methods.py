"""Iso-C, Iso-CTS and TSV-M against their papers' formulas with singular value decompositions in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm
from formulas import polar, spectral, svd
from freemerge.cli import main

METHODS = ("iso_c", "iso_cts", "tsv_m", "jsv")
SHAPES = [(12, 30), (30, 12), (16, 16), (2, 9), (3, 16, 20)]


def tensors(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """A base and models whose task vectors are far from singular (of square ones, some seeds are not)."""
    generator = torch.Generator().manual_seed(100 + sum(shape) + count)
    base = torch.randn(shape, generator=generator).to(dtype)
    models = [(base + 0.1 * (i + 1) * torch.randn(shape, generator=generator)).to(dtype) for i in range(count)]
    return base, models


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_formula(method: str, shape: tuple[int, ...], count: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, models = tensors(shape, count, dtype)
        vectors = [model.double() - base.double() for model in models]
        if method in ("tsv_m", "jsv") and count > min(shape[-2:]):
            continue  # more directions than there is room for: their order decides, see below
        for compute, error in (("float64", 1e-7), ("float32", 3e-5)):
            recipe = fm.Recipe(method=method, scale=1.0, compute_dtype=compute, out_dtype="float64")
            merged = fm.merge_tensors(base, models, recipe=recipe).double() - base.double()
            expected = spectral(method, vectors)
            torch.testing.assert_close(merged, expected, rtol=0, atol=error * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_the_formula_where_singular_values_decay(method: str) -> None:
    """What is rounded off the sum counts the more, the smaller the singular value of a direction is."""
    generator = torch.Generator().manual_seed(0)
    decay = 10 ** -torch.linspace(0, 4.5, 16)
    vectors = [
        torch.randn(64, 16, generator=generator) * decay @ torch.randn(16, 300, generator=generator) for _ in range(4)
    ]
    merged = fm.merge_deltas(vectors, recipe=fm.Recipe(method=method, scale=1.0, out_dtype="float64"))
    expected = spectral(method, [vector.double() for vector in vectors])
    torch.testing.assert_close(merged, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_more_models_than_directions(method: str) -> None:
    base, models = tensors((2, 9), 5)
    merged = fm.merge_tensors(base, models, method=method)
    assert torch.isfinite(merged).all()
    assert not torch.equal(merged, base)


@pytest.mark.parametrize("method", METHODS)
def test_one_model_and_no_model_at_all(method: str) -> None:
    base, (model,) = tensors((12, 20), 1)
    if method == "tsv_m":  # all its singular triplets
        torch.testing.assert_close(fm.merge_tensors(base, [model], recipe=fm.Recipe(method=method, scale=1.0)), model)
    assert torch.equal(fm.merge_tensors(base, [base, base], method=method), base)
    assert torch.isfinite(fm.merge_tensors(base, [base, model], method=method)).all()


def test_low_rank_stays_low_rank() -> None:
    """Directions that no task vector has are rounding, and get nothing."""
    generator = torch.Generator().manual_seed(0)
    vectors = [
        torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=generator) / (i + 1) for i in range(3)
    ]
    merged = {
        method: fm.merge_tensors(torch.zeros(20, 30), vectors, recipe=fm.Recipe(method=method, scale=1.0)).double()
        for method in METHODS
    }
    left, values, right = svd(sum(vector.double() for vector in vectors))
    expected = values[:6].sum() / 6 * left[:, :6] @ right[:6]
    torch.testing.assert_close(merged["iso_c"], expected, rtol=0, atol=1e-5)
    for method, tensor in merged.items():
        spectrum = torch.linalg.svdvals(tensor)
        assert float(spectrum[6]) < 1e-5 * float(spectrum[0]), method
    # TSV-M whitens the six pairs of vectors that there are.
    triplets = [svd(vector.double()) for vector in vectors]
    lefts = polar(torch.cat([u[:, :2] for u, _, _ in triplets], 1))
    rights = polar(torch.cat([vh[:2] for _, _, vh in triplets]))
    expected = lefts @ torch.diag(torch.cat([s[:2] for _, s, _ in triplets])) @ rights
    torch.testing.assert_close(merged["tsv_m"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_matrix_is_averaged(method: str) -> None:
    base = {"bias": torch.zeros(6), "conv.weight": torch.zeros(4, 3, 3, 3), "embed.weight": torch.zeros(10, 4)}
    models = [{name: torch.full_like(tensor, value) for name, tensor in base.items()} for value in (1.0, 2.0, 6.0)]
    recipe = fm.Recipe(method=method, scale=2.0, select=[("embed*", "merge"), ("bias", "filter")])
    assert {float(value) for tensor in fm.merge(base, models, recipe).values() for value in tensor.unique()} == {6.0}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 12, 20), (2, 3, 12, 20)])
def test_each_matrix_of_a_batch_is_merged_as_it_is_alone(method: str, shape: tuple[int, ...]) -> None:
    """Also where a model left some of them, such as experts, as they were."""
    base, models = tensors(shape, 3)
    models[1][0], models[2][-1] = base[0], base[-1]
    recipe = fm.Recipe(method=method, scale=1.0, out_dtype="float64", select=[("experts", "filter")])
    together = fm.merge_tensors(base, models, recipe=recipe, name="experts")
    for index in torch.cartesian_prod(*map(torch.arange, shape[:-2])).view(-1, len(shape) - 2).tolist():
        at = tuple(index)
        alone = fm.merge_tensors(base[at], [model[at] for model in models], recipe=recipe)
        torch.testing.assert_close(together[at], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, "wudi"])
@pytest.mark.parametrize(
    ("side", "dtype"), [((40, 64), torch.float32), ((64, 40), torch.float32), ((40, 40), torch.float64)]
)
@pytest.mark.parametrize("count", [2, 3, 45])
def test_matrices_of_a_batch_may_have_any_ranks(
    method: str, side: tuple[int, int], dtype: torch.dtype, count: int
) -> None:
    """Such as updates of experts by adapters of different ranks: what one has fewer of is padded with zeros."""
    generator = torch.Generator().manual_seed(0)
    height, width = side

    def low_rank(rank: int) -> Tensor:
        left = torch.randn(height, rank, generator=generator, dtype=dtype)
        return left @ torch.randn(rank, width, generator=generator, dtype=dtype)

    vectors = [torch.stack([low_rank(1 + (i * j + j) % 17) for j in range(5)]) for i in range(count)]
    recipe = fm.Recipe(method=method, scale=1.0, out_dtype="float64", select=[("experts", "filter")])
    together = fm.merge_deltas(vectors, recipe=recipe, name="experts")
    for j in range(5):
        alone = fm.merge_deltas([vector[j] for vector in vectors], recipe=recipe)
        torch.testing.assert_close(together[j], alone, rtol=0, atol=2e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_views_are_the_matrices(method: str) -> None:
    q, qs = tensors((12, 20), 3)
    k, ks = tensors((18, 20), 3)
    recipe = fm.Recipe(method=method, scale=1.0)
    fused = fm.merge_tensors(torch.cat([q, k]), [torch.cat(pair) for pair in zip(qs, ks, strict=True)], recipe=recipe)
    models = [{"a.q": own, "a.k": other} for own, other in zip(qs, ks, strict=True)]
    stacked = fm.merge({"a.q": q, "a.k": k}, models, recipe.replace(views=[fm.Stack(("*.q", "*.k"))]))
    assert torch.equal(torch.cat([stacked["a.q"], stacked["a.k"]]), fused)
    split = fm.merge(
        {"qk": torch.cat([q, k])},
        [{"qk": torch.cat(pair)} for pair in zip(qs, ks, strict=True)],
        recipe.replace(views=[fm.Split("qk", (12, 18))]),
    )["qk"]
    separate = fm.merge({"a.q": q, "a.k": k}, models, recipe)
    torch.testing.assert_close(split, torch.cat([separate["a.q"], separate["a.k"]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_default_scale_is_the_projection_on_the_task_vectors(method: str, tmp_path: Path) -> None:
    made = {"a.weight": tensors((12, 20), 3), "b.weight": tensors((16, 9), 3), "b.bias": tensors((16,), 3)}
    base = {name: tensor for name, (tensor, _) in made.items()} | {"steps": torch.tensor(3)}
    models = [{n: made[n][1][i] for n in made} | {"steps": torch.tensor(3)} for i in range(3)]
    unscaled = fm.merge(base, models, fm.Recipe(method=method, scale=1.0, out_dtype="float64"))
    square = overlap = 0.0
    for name in made:
        vectors = torch.stack([model[name].double() - base[name].double() for model in models])
        square += float(vectors.square().sum())
        overlap += float(((unscaled[name] - base[name].double()) * vectors.sum(0)).sum())

    report = fm.merge_checkpoints(base, models, tmp_path / "out", fm.Recipe(method=method), progress=False)
    regained = {"tsv_m": 0.8, "jsv": 0.85}.get(method, 1.0)
    assert report.scale == pytest.approx(regained * square / overlap, rel=1e-6)
    assert report.weights is None
    manifest = json.loads((tmp_path / "out" / "freemerge.json").read_text())
    assert manifest["recipe"]["scale"] == "auto"
    assert manifest["recipe"]["measured"] == {"weights": None, "scale": report.scale}
    again = fm.merge(base, models, fm.Recipe(method=method, scale=report.scale))
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, again[name])


def test_only_the_default_scale_costs_another_pass() -> None:
    base, models = tensors((12, 20), 2)
    state, others = {"w": base, "b": base[0]}, [{"w": model, "b": model[0]} for model in models]
    once = 3 * (state["w"].nbytes + state["b"].nbytes)
    for method, reads in (("iso_c", once), ("tsv_m", once), ("iso_cts", once + 3 * base.nbytes)):
        known = fm.inspect(state, others, fm.Recipe(method=method, scale=1.0))
        measured = fm.inspect(state, others, fm.Recipe(method=method))
        assert (known.passes, known.read_bytes) == (1, reads)
        assert (measured.passes, measured.read_bytes) == (2, 2 * reads)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(method: str, bad: float) -> None:
    base, models = tensors((12, 20), 2)
    models[0][2, 3] = bad
    for scale in ("auto", 1.0):
        recipe = fm.Recipe(method=method, scale=scale)
        with pytest.raises(fm.CheckpointError, match=r"a\.weight"):
            fm.merge_tensors(base, models, recipe=recipe, name="a.weight")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, models = tensors((12, 20), 2)
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    for path, tensor in zip(paths, (base, *models), strict=True):
        save_file({"w": tensor}, path)
    for method, options in (("iso_c", []), ("iso_cts", ["--common", "0.5"]), ("tsv_m", []), ("ties", []), ("pcb", [])):
        out = tmp_path / method
        assert main(["merge", *paths, "-o", str(out), "--method", method, *options]) == 0
        scale = json.loads((out / "freemerge.json").read_text())["recipe"]["measured"]["scale"]
        weights = "weights 0.5000, 0.5000; " if method == "ties" else ""
        assert capsys.readouterr().out == f"{out}: {weights}scale {scale:g}\n"
        recipe = fm.Recipe(method=method, **({"common": 0.5} if options else {}))
        assert torch.equal(load_file(out / "model.safetensors")["w"], fm.merge_tensors(base, models, recipe=recipe))
    assert (
        main(["merge", *paths, "-o", str(tmp_path / "dare"), "--method", "dare", "--seed", "7", "--drop", "0.5"]) == 0
    )
    expected = fm.merge_tensors(base, models, recipe=fm.Recipe(method="dare", seed=7, drop=0.5), name="w")
    assert torch.equal(load_file(tmp_path / "dare" / "model.safetensors")["w"], expected)
    assert main(["merge", *paths, "-o", str(tmp_path / "no"), "--method", "dare", "--seed", "x"]) == 2
    assert "--seed must be a whole number >= 0" in capsys.readouterr().err
