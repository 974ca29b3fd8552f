"""Every measure against its plain formula, and against known answers."""

from __future__ import annotations

import math

import numpy as np
import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import freemerge as fm
from freemerge.analysis import Measures, analyze, singular
from freemerge.analysis.bands import band_of, band_sums
from freemerge.analysis.singular import singular_sums
from freemerge.analysis.sums import BANDS, EDGES, RANKS
from freemerge.methods import FR, IsoC, TaskArithmetic
from in_memory import noise

SHAPES = [(13, 7), (1, 17), (17, 1), (1, 1), (2, 3), (31, 37), (24, 24), (64, 9)]
METHODS = {"sum": TaskArithmetic(), "filter": FR(cutoff=0.3), "iso": IsoC()}


def measured(vectors: list[Tensor]) -> Measures:
    """The measures of a model of one tensor, with the given task vectors of a base of zeros."""
    zero = {"w": torch.zeros_like(vectors[0])}
    return analyze(zero, [{"w": vector} for vector in vectors], methods=METHODS, select=[("*", "filter")]).total


def close(value: float | None, expected: float | None, tolerance: float = 1e-5) -> bool:
    if value is None or expected is None:
        return value is expected
    return math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)


@pytest.mark.parametrize("shape", [*SHAPES, (19,), (40,)])
def test_entries_and_bands(shape: tuple[int, ...]) -> None:
    base, tuned = plain.models({"w": shape}, 3)
    analysis = analyze(base, tuned, methods=METHODS, select=[("*", "filter")])
    total = analysis.total
    vectors = plain.task_vectors(base, tuned, "w")
    for i, vector in enumerate(vectors):
        size = np.linalg.norm(vector) / np.linalg.norm(base["w"].double().numpy())
        assert close(total.relative_size[i], float(size))
        assert all(map(close, total.spectra[i].bands, plain.relative_energy(vector)))
        rows = plain.matrix(vector)
        means = [rows.shape[1 - axis] * (rows.mean(1 - axis) ** 2).sum() for axis in (0, 1)]  # of rows, of columns
        expected = [mean * rows.shape[1 - axis] / (rows**2).sum() for axis, mean in enumerate(means)]
        assert close(total.spectra[i].row_means, expected[0])
        assert close(total.spectra[i].column_means, expected[1])
    for i, j in plain.pairs(3):
        assert close(total.cosine[i][j], plain.cosine(vectors[i], vectors[j]))
        signs = np.sign(vectors[i] * vectors[j])
        assert close(total.sign_agreement[i][j], float((signs > 0).sum() / (signs != 0).sum()))
    amplitudes = np.array([np.abs(plain.spectrum(vector)) for vector in vectors])
    assert close(total.variance, float(amplitudes.var(0).sum() / (amplitudes**2).mean(0).sum()))
    assert all(map(close, total.band_variance, plain.amplitude_variance(vectors)))
    for band, mask in enumerate(plain.band_masks(shape)):
        if mask.any():
            cosines = [plain.band_cosine(vectors[i], vectors[j], mask) for i, j in plain.pairs(3)]
            assert close(total.band_cosine[band], sum(cosines) / 3)
        else:
            assert total.band_cosine[band] is None


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values(shape: tuple[int, int]) -> None:
    base, tuned = plain.models({"w": shape}, 2, seed=1)
    total = analyze(base, tuned, methods={}).total
    side, bases = min(shape), []
    for spectrum, vector in zip(total.spectra, plain.task_vectors(base, tuned, "w"), strict=True):
        left, values, right = np.linalg.svd(vector, full_matrices=False)
        energy = values**2
        assert close(spectrum.effective_rank, energy.sum() ** 2 / (energy**2).sum() / side)
        assert close(spectrum.stable_rank, energy.sum() / energy.max() / side)
        expected = [energy[:rank].sum() / energy.sum() for rank in RANKS]
        assert all(map(close, spectrum.top, expected))
        count = min(singular.DIRECTIONS, max(1, side // 2))
        bases.append((left[:, :count], right[:count].T, count))
    overlaps = []
    for end, size in enumerate(shape):
        count = bases[0][2]
        if count < size:
            shared = (np.linalg.norm(bases[0][end].T @ bases[1][end]) ** 2) / count
            overlaps.append((shared - count / size) / (1 - count / size))
    assert close(total.overlap[0][1], sum(overlaps) / len(overlaps) if overlaps else None, 1e-4)
    assert total.overlap[0][0] is None


def test_large_matrices_by_subspace_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decaying spectrum, as a sum of updates has; the ranks are exact, and the strongest directions are found."""
    decay = 0.8 ** torch.arange(60)
    vectors = [noise(120, 60, seed=s) * decay @ noise(60, 200, seed=s + 9) for s in (0, 1)]
    exact = singular_sums(vectors, 2)
    monkeypatch.setattr(singular, "EXACT_SIDE", 100)
    monkeypatch.setattr(singular, "LEADING", 16)
    for turned in (vectors, [vector.mT.contiguous() for vector in vectors]):
        found = singular_sums(turned, 2)
        np.testing.assert_allclose(found.effective, exact.effective, rtol=1e-4)
        np.testing.assert_allclose(found.stable, exact.stable, rtol=1e-4)
        np.testing.assert_allclose(found.top[:, :5], exact.top[:, :5], rtol=1e-4)
        np.testing.assert_allclose(found.overlap, exact.overlap, atol=1e-4)
        assert (found.known[:, 5:] == 0).all(), "more than 16 directions are not known"


def test_measures_after_merging() -> None:
    base, tuned = plain.models({"a.weight": (20, 33), "b.weight": (33, 20), "b.bias": (20,)}, 3)
    analysis = analyze(base, tuned, methods=METHODS)
    flat = [np.concatenate([plain.task_vectors(base, tuned, n)[i].ravel() for n in base]) for i in range(3)]
    for label, method in METHODS.items():
        doubles = [{n: t.double() for n, t in state.items()} for state in (base, *tuned)]
        merged = fm.merge(doubles[0], doubles[1:], fm.Recipe(method=method))
        change = np.concatenate([(merged[n] - doubles[0][n]).numpy().ravel() for n in base])  # c X
        found = analysis.total.methods[label]
        size = np.linalg.norm(change) / math.sqrt(np.mean([(vector**2).sum() for vector in flat]))
        assert close(found.norm, float(size), 1e-4), label
        for i, vector in enumerate(flat):
            assert close(found.cosine[i], plain.cosine(change, vector), 1e-4)
            assert close(found.kept[i], float((change * vector).sum() / (vector**2).sum()), 1e-4)
        assert (found.filter is None) == (label != "filter")
    assert analysis.scales == pytest.approx({"sum": 0.4, "filter": 1.2, "iso": analysis.advice.scale})
    iso = analysis.total.methods["iso"]
    assert sum(iso.kept[i] * (v**2).sum() for i, v in enumerate(flat)) == pytest.approx(sum((v**2).sum() for v in flat))


def test_what_a_filter_keeps_and_leaves() -> None:
    base, tuned = plain.models({"w": (20, 33)}, 3)
    found = analyze(base, tuned, methods=METHODS).total.methods["filter"]
    kept = fm.HighPass(0.3).mask((20, 33)) == 1
    spectra = np.array([plain.spectrum(vector) for vector in plain.task_vectors(base, tuned, "w")])
    power, variance = (np.abs(spectra) ** 2).mean(0), np.abs(spectra).var(0)
    assert found.filter is not None
    assert close(found.filter.bins, float(kept.mean()))
    assert close(found.filter.energy, float(power[kept].sum() / power.sum()))
    assert close(found.filter.variance, float(variance[kept].sum() / variance.sum()))
    below = [edge <= 0.3 for edge in EDGES[1:]]
    empty = [not mask.any() for mask in plain.band_masks((20, 33))]
    assert [value is None for value in found.bands] == [a or b for a, b in zip(below, empty, strict=True)]
    left = [value for value, low in zip(found.spectrum.bands, below, strict=True) if low and value is not None]
    assert max(left) < 1e-9


def test_groups_add_up() -> None:
    shapes = {"head": (5, 9), "layers.0.up.weight": (9, 20), "layers.1.up.bias": (9,), "layers.1.up.weight": (9, 20)}
    base, tuned = plain.models(shapes, 2)
    analysis = analyze(base, tuned)
    assert list(analysis.module_types) == ["head", "layers.*.up.weight", "layers.*.up.bias"]
    assert list(analysis.depths) == [0, 1]
    found = [(tensor.name, tensor.shape, tensor.depth) for tensor in analysis.tensors]
    assert found == [(name, shape, depth) for (name, shape), depth in zip(shapes.items(), (None, 0, 1, 1), strict=True)]
    alone = analyze({"x": base["head"]}, [{"x": model["head"]} for model in tuned]).total
    assert analysis.module_types["head"].spectra == alone.spectra
    layers = [plain.task_vectors(base, tuned, f"layers.{i}.up.weight") for i in (0, 1)]
    first, second = (np.concatenate([layer[task].ravel() for layer in layers]) for task in (0, 1))
    assert close(analysis.module_types["layers.*.up.weight"].mean_cosine, plain.cosine(first, second))
    assert analysis.total.entries == sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("shape", [(48, 48), (40, 100), (1, 64), (64,)])
def test_identical_task_vectors(shape: tuple[int, ...]) -> None:
    total = measured([noise(*shape)] * 3)
    assert all(value == pytest.approx(1) for row in (*total.cosine, *total.sign_agreement) for value in row)
    assert all(value is None or value == pytest.approx(1) for value in total.band_cosine)
    assert all(value is None or value < 1e-12 for value in total.band_variance)
    assert total.mean_overlap == pytest.approx(1)
    assert total.methods["sum"].cosine == pytest.approx((1, 1, 1))
    assert total.methods["sum"].norm == pytest.approx(1.2)


def test_orthogonal_task_vectors() -> None:
    first, second = torch.zeros(2, 40, 40)
    first[:20, :20], second[20:, 20:] = noise(20, 20), noise(20, 20, seed=1)
    total = measured([first, second])
    assert total.mean_cosine == 0
    assert total.mean_sign_agreement is None, "no entry is non-zero in both"
    assert total.mean_overlap is not None
    assert total.mean_overlap < 0, "less than by chance: the subspaces are orthogonal"


def test_white_noise_has_a_flat_spectrum() -> None:
    vectors = [noise(300, 260, seed=seed) for seed in range(3)]
    total = measured(vectors)
    sizes = np.bincount(band_of((300, 260)).ravel(), minlength=BANDS)  # about half of the bins, all independent
    for spectrum in total.spectra:
        errors = (np.array(spectrum.bands, dtype=float) - 1) * np.sqrt(sizes)
        assert np.abs(errors).max() < 4.5, "standard deviations"
    independent = (1 - math.pi / 4) * (1 - 1 / 3)
    np.testing.assert_allclose(np.array(total.band_variance, dtype=float)[1:], independent, rtol=0.06)
    assert total.mean_sign_agreement == pytest.approx(0.5, abs=0.01)
    assert total.mean_overlap == pytest.approx(0, abs=0.02)


def test_a_low_frequency_ramp_is_in_the_lowest_band() -> None:
    ramp = torch.arange(200.0)[:, None] + torch.arange(200.0)[None, :]
    total = measured([ramp, -ramp])
    share = (band_of((200, 200)) == 0).mean()
    wave = torch.cos(2 * math.pi * torch.arange(200.0) / 200).expand(200, 200)
    assert total.spectra[0].bands[0] is not None
    bins = plain.band_masks((200, 200))[0].mean()
    assert total.spectra[0].bands[0] * bins > 0.99, "a step at its end leaks a little"
    assert measured([wave]).spectra[0].bands[0] * bins == pytest.approx(1, rel=1e-6)
    assert share < 0.02
    assert total.mean_cosine == pytest.approx(-1)
    assert total.mean_sign_agreement == 0


def test_task_vectors_whose_norm_is_beyond_float32() -> None:
    vector = noise(40, 60)
    base = {"w": torch.zeros_like(vector)}
    large, small = (analyze(base, [{"w": size * vector}], methods={}).total.spectra[0] for size in (1e37, 1.0))
    assert close(large.effective_rank, small.effective_rank)
    assert all(map(close, large.top, small.top))


def test_zero_task_vectors_have_no_measures() -> None:
    total = measured([torch.zeros(8, 12), noise(8, 12)])
    assert total.spectra[0].bands == (None,) * BANDS
    assert total.spectra[0].effective_rank is None
    assert total.cosine == ((None, None), (None, pytest.approx(1)))
    assert total.relative_size == (None, None), "the base is zero"


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3))
def test_energy_is_conserved(height: int, width: int, batch: int) -> None:
    """Parseval: bands and entries tell the same scalar products; a stack is its matrices."""
    vectors = [noise(batch, height, width, seed=seed) for seed in range(3)]
    sums = band_sums(list(vectors), 2, [None])
    flat = torch.stack([vector.flatten() for vector in vectors]).double()
    np.testing.assert_allclose(sums.gram.sum(0), (flat @ flat.mT).numpy(), rtol=1e-5, atol=1e-5)
    assert sums.bins.sum() == batch * height * width
    alone = [band_sums([v[i].clone() for v in vectors], 2, [None]) for i in range(batch)]
    np.testing.assert_allclose(sums.variance, sum(one.variance for one in alone), rtol=1e-5, atol=1e-6)


def test_autocast_changes_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(singular, "EXACT_SIDE", 100)
    generator = torch.Generator().manual_seed(4)
    vectors = [torch.randn(150, 180, generator=generator) for _ in range(2)]
    expected = singular.singular_sums(vectors, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = singular.singular_sums(vectors, 2)
    for name, sums in vars(expected).items():
        assert np.array_equal(getattr(found, name), sums), name
