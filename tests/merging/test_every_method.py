"""Every method against its formula in float64: all shapes and dtypes, and a sharded bf16 Llama through the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llamas import llama, read
from torch import Tensor

import formulas
import freemerge as fm
from freemerge.checkpoint import Checkpoint
from freemerge.merging.units import plan_units
from freemerge.methods import METHODS
from reference import reference_merge

State = dict[str, Tensor]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BY_TENSOR = ("breadcrumbs", "model_stock")
FORMULAS = [name for name in METHODS if name not in ("fr", "dare", *BY_TENSOR)]  # FR has its own file, DARE is random
THRESHOLDS = ("ties", "pcb", "breadcrumbs")


def task_vectors(base: State, models: list[State]) -> dict[str, list[Tensor]]:
    """In the arithmetic of the merge, exact from there on."""
    return {n: [(m[n].to(_compute(t, m[n])) - t.to(_compute(t, m[n]))) for m in models] for n, t in base.items()}


def _compute(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [tensor.dtype for tensor in tensors] else torch.float32


def update(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if kind == "zero" or not shape:
        return torch.zeros(shape)
    if kind == "rank one":
        rows = torch.randn(*shape[:-1], 1, generator=generator)
        return rows * torch.randn(*shape[:-2], *[1] * (len(shape) > 1), shape[-1], generator=generator)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("method", FORMULAS)
@settings(max_examples=60)
@given(
    shape=st.sampled_from([(1, 1), (1, 23), (23, 1), (2, 9), (7, 13), (13, 11), (31, 8), (16, 18), (2, 17, 19), (5,)]),
    kinds=st.lists(st.sampled_from(["full", "full", "rank one", "zero", "duplicate"]), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    compute=st.sampled_from(["float64", "float32"]),
    seed=st.integers(0, 2**31),
)
def test_the_formula(
    method: str, shape: tuple[int, ...], kinds: list[str], dtype: torch.dtype, compute: str, seed: int
) -> None:
    if method in ("iso_cts", "tsv_m", "jsv") and len(kinds) > min(shape[-2:]):
        kinds = kinds[: min(shape[-2:])]  # where there are more directions than room, their order decides
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    if compute == "float32":  # differences are exact, sums nearly so
        base = torch.zeros(shape)
        if method in ("iso_cts", "tsv_m", "jsv"):  # see test_spectral_methods.py, with matrices that allow it
            compute = "float64"
    updates: list[Tensor] = []
    for i, kind in enumerate(kinds):
        again = kind == "duplicate" and updates
        updates.append(updates[-1] if again else 0.1 * (i + 1) * update(kind, shape, generator))
    base = base.to(dtype)
    models = [(base.double() + change.double()).to(dtype) for change in updates]
    options: dict[str, Any] = {"density": 0.3} if method in ("ties", "pcb") else {}
    recipe = fm.Recipe(method=method, scale=1.0, compute_dtype=compute, out_dtype="float64", **options)
    result = fm.merge_tensors(base, models, recipe=recipe) - base.double()
    vectors = {"w": [model.double() - base.double() for model in models]}
    expected = formulas.merged(method, vectors, **options)["w"]
    amplified = compute == "float32" and method == "iso_c" and len(shape) > 1
    error = 1e-6 * (condition(vectors["w"]) if amplified else 1.0) * float(expected.abs().max())
    if method in ("ties", "pcb"):  # an entry at a threshold may fall on either side
        assert int(((result - expected).abs() > error).sum()) <= 1
    else:
        torch.testing.assert_close(result, expected, rtol=0, atol=error)


@pytest.mark.parametrize("method", BY_TENSOR)
@settings(max_examples=60)
@given(
    shape=st.sampled_from([(1, 1), (1, 23), (7, 13), (2, 17, 19), (5,), (300,)]),
    kinds=st.lists(st.sampled_from(["full", "full", "rank one", "zero"]), min_size=2, max_size=5),
    dtype=st.sampled_from(DTYPES),
    compute=st.sampled_from(["float64", "float32"]),
    seed=st.integers(0, 2**31),
)
def test_the_formula_of_each_tensor(
    method: str, shape: tuple[int, ...], kinds: list[str], dtype: torch.dtype, compute: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.zeros(shape, dtype=dtype)
    models = [(0.1 * (i + 1) * update(kind, shape, generator)).to(dtype) for i, kind in enumerate(kinds)]
    recipe = fm.Recipe(method=method, scale=1.0, compute_dtype=compute, out_dtype="float64")
    result = fm.merge_tensors(base, models, recipe=recipe)
    expected = formulas.merged(method, {"w": models})["w"]
    error = 1e-6 * float(expected.abs().max())
    if method == "model_stock":  # the ratio is a quotient of two small numbers where task vectors cancel
        mean = formulas.total(models) / len(models)
        error = 1e-6 * float(mean.abs().max()) * (1 + float((expected / mean).nan_to_num().abs().max())) ** 2
    torch.testing.assert_close(result, expected, rtol=0, atol=error)


def condition(vectors: list[Tensor]) -> float:
    """The largest over the smallest singular value of the sum that counts: what a polar factor makes of rounding."""
    matrices = torch.stack(vectors).sum(0)
    spectra = [formulas.nonzero(matrix)[1] for matrix in matrices.reshape(-1, *matrices.shape[-2:])]
    return max(float(values.max() / values.min()) if len(values) else 1.0 for values in spectra)


# A model --------------------------------------------------------------------------------------------------------------


def assert_rounded(result: State, expected: State, base: State) -> None:
    """The bf16 nearest to the expected weights; ties of rounding and the method's own error may go the other way."""
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        delta = float((tensor - base[name].double()).abs().max())
        allowed = torch.finfo(torch.bfloat16).eps / 2 * tensor.abs() + 1e-4 * delta
        assert result[name].dtype == torch.bfloat16
        assert ((result[name].double() - tensor).abs() <= allowed).all(), name
        assert tensor.ndim < 2 or not torch.equal(result[name], base[name])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_sharded_bf16_llama(method: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 88}
    folders = [llama(tmp_path / str(seed), seed, 3e-3 * seed, "30KB", **sizes) for seed in range(4)]
    base, *models = map(read, folders)
    assert (folders[0] / "model.safetensors.index.json").exists()
    recipe = fm.Recipe(method=method)
    report = fm.merge_checkpoints(
        folders[0], folders[1:], tmp_path / "out", recipe, max_shard_bytes=40_000, progress=False
    )
    result = read(tmp_path / "out")
    if method == "fr":
        units = plan_units(Checkpoint.open(base).specs)
        assert_rounded(result, reference_merge(base, models, recipe, units), base)
        return
    vectors = task_vectors(base, models)
    if method == "dare":  # each entry of the merged vector is a sum of some of the rescaled ones
        for name, tensor in base.items():
            kept = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
            sums = torch.tensordot(kept, torch.stack(vectors[name]), 1) * (report.scale / (1 - recipe.drop))
            allowed = torch.finfo(torch.bfloat16).eps / 2 * result[name].float().abs() + 1e-6
            assert ((result[name].float() - tensor.float() - sums).abs().amin(0) <= allowed).all(), name
        return
    unscaled = formulas.merged(method, vectors)
    scale = recipe.global_scale(3)
    if scale is None:
        scale = METHODS[method].regained * formulas.projection_scale(vectors, unscaled)
        assert report.scale == pytest.approx(scale, rel=1e-5)
    expected = {name: tensor.double() + scale * unscaled[name] for name, tensor in base.items()}
    if method in THRESHOLDS:  # many entries stay what they are
        for name, tensor in expected.items():
            close = torch.isclose(result[name].double(), tensor, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=1e-6)
            assert int((~close).sum()) <= 2, name  # at a threshold
        return
    assert_rounded(result, expected, base)


@pytest.mark.parametrize("backend", ["cpu", "cuda-emulated"], indirect=True)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_backends_agree_with_torch(method: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in {"w": (24, 40), "b": (7,)}.items()}
    models = [
        {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        for _ in range(3)
    ]
    recipe = fm.Recipe(method=method, filter=None if method == "fr" else "after")
    expected = fm.merge(base, models, recipe, backend="torch")
    for name, tensor in fm.merge(base, models, recipe, backend=backend).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6)
