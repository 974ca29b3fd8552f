"""The planner's promises: sizes, error bounds, and what it does when a form is out of reach."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import freemerge as fm
from fallback import Elsewhere
from freemerge.backends.base import Backend
from freemerge.backends.cpu import CpuBackend
from freemerge.backends.torch import TorchBackend
from freemerge.planner.forms import ERROR_LIMIT, _smooth, candidates
from freemerge.planner.plan import Decimation
from freemerge.planner.windows import Window, half_bin, window_error, window_transform
from in_memory import noise
from oracle import dft_matrix, oracle_filter
from reference import reference_filter


def is_smooth(n: int) -> bool:
    for prime in (2, 3, 5):
        while n % prime == 0:
            n //= prime
    return n == 1


@given(st.integers(1, 5000), st.sampled_from([1, 2, 16, 32]))
def test_smooth_sizes_are_the_smallest(minimum: int, multiple: int) -> None:
    size = _smooth(minimum, multiple)
    smaller = range(multiple * math.ceil(minimum / multiple), size, multiple)
    assert size >= minimum
    assert is_smooth(size // multiple)
    assert not any(is_smooth(n // multiple) for n in smaller)


def dense(n: int, d: Decimation, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrices that the products of a window add up to, on the way down and back."""
    window = Window(n, d)
    down, up = np.zeros((d.cells, n)), np.zeros((d.cells, n))
    for p in window.spread(block):
        down[p.cell0 : p.cell1, p.sample0 : p.sample1] += p.weights.numpy()
    for p in window.interpolate(block):
        for cell in range(p.cell0, p.cell1):
            up[cell % d.cells, p.sample0 : p.sample1] += p.weights[:, cell - p.cell0].numpy()
    return down, up


@pytest.mark.parametrize("nyquist", [False, True])
@pytest.mark.parametrize(("n", "cells", "taps", "band"), [(64, 24, 6, 5), (97, 30, 9, 8), (210, 36, 7, 9)])
@pytest.mark.parametrize("block", [1, 4, 100])
def test_windows_are_one_operator_however_they_are_cut(
    n: int, cells: int, taps: int, band: int, nyquist: bool, block: int
) -> None:
    d = Decimation(cells, taps, band, nyquist)
    down, up = dense(n, d, block)
    np.testing.assert_allclose(down, up, rtol=0, atol=5e-15)
    # Cell transforms are phihat times sample transforms, offset by offset; around an odd n's Nyquist at half bins.
    half, centre = half_bin(n, d), (n + 1) // 2 if nyquist else 0
    offsets = np.arange(1 - band - int(2 * half), band)
    turns = np.exp(-2j * np.pi * half * np.arange(cells) / cells)[:, None]
    samples = dft_matrix(n)[(offsets + centre) % n]
    coarse = (dft_matrix(cells) @ (turns * down))[offsets % cells] / window_transform(d, offsets + half)[:, None]
    alias = np.linalg.norm(coarse - samples, axis=1) / math.sqrt(n)
    assert alias.max() < 1e-3
    assert alias[-1] == pytest.approx(window_error(n, d).alias, rel=0.1), "of the edge of the band"


ON_A_CPU = pytest.mark.parametrize(
    "backend", [CpuBackend(), TorchBackend(), Elsewhere()], ids=["cpu", "torch", "elsewhere"]
)


@ON_A_CPU
@pytest.mark.parametrize("kind", ["constant", "ramp", "tone"])
@pytest.mark.parametrize(
    "shape", [(1, 1000), (1, 1024), (1, 16384), (1000, 3), (64, 64), (16384, 4), (200, 64), (211, 331), (2, 32003)]
)
def test_every_plan_keeps_its_bound_on_inputs_that_add_up(backend: Backend, kind: str, shape: tuple[int, int]) -> None:
    """Noise hides the rounding of long sums; what is all at low frequencies does not."""
    height, width = shape
    y, x = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)[None, :]
    signal = {
        "constant": torch.ones(shape, dtype=torch.float64),
        "ramp": y / height + x / width,
        "tone": torch.cos(2 * math.pi * y / height) + torch.cos(4 * math.pi * x / width),
    }[kind]
    matrix = (signal + 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).float()
    response = fm.HighPass(3, unit="bins")
    mask = torch.from_numpy(response.mask(shape))
    exact = torch.fft.ifft2(mask * torch.fft.fft2(matrix.double())).real
    traits = backend.traits(torch.device("cpu"))
    assert traits is not None
    found = candidates(response, shape, torch.float32, "cpu", backend.name, traits)
    supported = [plan for plan in found if backend.supports(plan) is None]
    assert supported
    for plan in supported:
        result = matrix.clone()
        backend.prepare(plan).run([result[None]], 1.0)
        error = float((result.double() - exact).norm() / matrix.double().norm())
        assert error <= plan.error_bound, plan


@ON_A_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "cutoff"), [((768, 768), 0.05), ((513, 2048), 0.2), ((1009, 640), 0.1)])
def test_the_error_bound_holds_for_the_worst_input(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int], cutoff: float
) -> None:
    """All energy at the frequency that aliases onto the edge of the band, which the filter must leave alone."""
    response, traits = fm.HighPass(cutoff), backend.traits(torch.device("cpu"))
    assert traits is not None
    plans = [plan for plan in candidates(response, shape, dtype, "cpu", backend.name, traits) if plan.rows]
    if not plans or backend.supports(plans[0]) is not None:
        pytest.skip("no windows, no aliases")
    (plan,) = plans
    assert plan.error_bound <= ERROR_LIMIT[dtype]
    assert plan.rows is not None
    alias = (plan.rows.band - 1 - plan.rows.cells) % shape[0]
    rows = torch.arange(shape[0], dtype=torch.float64)[:, None]
    tone = torch.cos(2 * math.pi * alias / shape[0] * rows).expand(shape).to(dtype).contiguous()
    tone /= tone.norm()
    y = tone.clone()
    backend.prepare(plan).run([y], 1.0)
    mask = torch.from_numpy(response.mask(shape))
    exact = torch.fft.ifft2(mask * torch.fft.fft2(tone.double())).real
    assert float((y.double() - exact).norm()) <= plan.error_bound


@ON_A_CPU
@pytest.mark.parametrize("shape", [(300, 400), (257, 129)])
@pytest.mark.parametrize("response", [fm.HighPass(0.03), fm.BandGain(0.03, 0.0, 1.5)], ids=repr)
def test_a_mean_that_is_taken_out_does_not_drown_the_result(
    backend: Backend, shape: tuple[int, int], response: fm.Response
) -> None:
    """|y| << |x|: the error stays in proportion to the result."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 300).float()
    mask = torch.from_numpy(response.mask(shape))
    expected = 2 * torch.fft.ifft2(mask * torch.fft.fft2(x.double())).real
    traits = backend.traits(torch.device("cpu"))
    assert traits is not None
    plans = candidates(response, shape, torch.float32, "cpu", backend.name, traits)
    assert any(plan.centers for plan in plans)
    for plan in plans:
        if plan.centers:
            y = x.clone()
            backend.prepare(plan).run([y], 2.0)
            assert (y.double() - expected).norm() <= 2e-5 * expected.norm(), plan


def test_the_torch_backend_decimates_where_products_are_fast() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((4096, 11008), (128256, 4096)):
            assert fm.explain(shape, fm.HighPass(0.05), dtype=dtype, device="cuda", backend="torch").form == "decimated"
            assert fm.explain(shape, fm.HighPass(0.05), dtype=dtype, backend="torch").form == "full"


def test_a_lowered_matmul_precision_rules_out_products() -> None:
    precision = torch.get_float32_matmul_precision()

    def form() -> str:
        return fm.explain((4096, 11008), fm.HighPass(0.05), device="cuda", backend="torch").form

    assert form() == "decimated"
    try:
        torch.set_float32_matmul_precision("medium")
        assert form() == "full"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert form() == "decimated"


def test_the_newer_way_to_lower_the_precision_is_seen_too() -> None:
    script = (
        "import torch, freemerge as fm; torch.backends.mkldnn.matmul.fp32_precision = 'bf16';"
        "print(fm.explain((4096, 11008), fm.HighPass(0.05), device='cuda', backend='torch').form)"
    )
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has only the older way")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "full", run.stderr


@pytest.mark.parametrize("shape", [(4096,), (1, 768), (3, 1, 768)])
def test_single_rows_are_left_to_torch(shape: tuple[int, ...]) -> None:
    plan = fm.explain(shape, fm.HighPass(0.05))
    assert plan.backend == "torch"
    assert "single row" in plan.reason
    assert fm.explain(shape, fm.HighPass(0.05), backend="cpu").backend == "cpu"
    assert fm.explain((2, 768), fm.HighPass(0.05)).backend == "cpu"


@pytest.mark.parametrize("shape", [(150, 203), (203, 150), (96, 64), (40, 8450), (8704, 37)])
@pytest.mark.parametrize("response", [fm.HighPass(0.4), fm.Butterworth(0.2), fm.Official(0.7)], ids=repr)
def test_every_candidate_of_the_cpu_gives_the_result(shape: tuple[int, int], response: fm.Response) -> None:
    backend = CpuBackend()
    traits = backend.traits(torch.device("cpu"))
    assert traits is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor(response.half_mask(shape))
    expected = torch.fft.irfft2(torch.fft.rfft2(x.double()) * mask, s=shape)
    plans = candidates(response, shape, x.dtype, "cpu", "cpu", traits)
    supported = [plan for plan in plans if backend.supports(plan) is None]
    assert {(plan.form, plan.transposed) for plan in supported} >= {("full", False), ("full", True)}
    for plan in supported:
        result = x.clone()
        backend.executable(plan).run([result[None]], 1.0)
        assert (result - expected).norm() <= 5e-7 * x.norm(), plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(700, 32), (1009, 47), (641, 3), (801, 130), (32, 700), (47, 1009), (47, 802), (130, 802)]
)
@pytest.mark.parametrize("response", [fm.HighPass(0.4), fm.BandGain(0.4, 0.5, 1.5), fm.Official(0.7)], ids=repr)
def test_the_cpu_leaves_the_short_side_of_a_matrix_whole(
    response: fm.Response, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    backend = CpuBackend()
    traits = backend.traits(torch.device("cpu"))
    assert traits is not None
    plans = candidates(response, shape, dtype, "cpu", "cpu", traits)
    short = Decimation(min(shape), 0, min(shape) // 2 + 1)
    whole = [
        plan
        for plan in plans
        if plan.form == "decimated" and (plan.rows if shape[0] < shape[1] else plan.columns) == short
    ]
    if isinstance(response, fm.Official) and shape[1] > shape[0] and shape[1] % 2:
        assert not whole  # its box is between two bins along the width then
        return
    (plan,) = whole
    assert backend.supports(plan) is None
    x = torch.randn(shape[0], shape[1] + 5, generator=torch.Generator().manual_seed(0)).to(dtype)[:, : shape[1]]
    expected = oracle_filter(x.double().numpy(), response.mask(shape))
    backend.executable(plan).run([x[None]], 1.0)
    rounded = torch.from_numpy(expected).to(dtype).double()
    error = (x.double() - rounded).norm() / rounded.norm()
    assert error <= 5e-7 + 0.1 * (dtype.itemsize == 2) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1500, 1536), (1320, 4000), (4000, 1320)])
def test_spectra_that_are_larger_than_caches(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Kernels ask early for what they read next, and filter the columns of such coarse grids in another way."""
    backend, response = CpuBackend(), fm.HighPass(0.4)
    traits = backend.traits(torch.device("cpu"))
    assert traits is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = reference_filter(x, response)
    plans = [p for p in candidates(response, shape, dtype, "cpu", "cpu", traits) if backend.supports(p) is None]
    assert dtype == torch.float64 or shape == (1500, 1536) or any(plan.form == "decimated" for plan in plans)
    for plan in plans:
        y = x.clone()
        backend.prepare(plan).run([y[None]], 1.0)
        error = float((y.double() - expected.to(dtype).double()).norm() / x.double().norm())
        assert error <= plan.error_bound + 0.1 * (dtype == torch.bfloat16) * torch.finfo(dtype).eps, plan


@pytest.mark.parametrize(
    ("n", "fits"),
    [(3 << 29, True), (1 << 31, False), ((1 << 30) + 3, False), (536870923, True), ((1 << 31) - 1, False)],
)
def test_lengths_without_a_transform_are_refused(n: int, fits: bool) -> None:
    """2^31 and more, and primes whose convolution would be that long."""
    backend = CpuBackend()
    for shape in ((7, n), (n, 7)):
        plan = replace(fm.explain((8, 8), fm.Gaussian(0.2), backend="cpu"), form="full", shape=shape)
        refusal = backend.supports(plan)
        assert refusal == (None if fits else f"it has no transforms of {n} samples")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50257, 768), (50256, 768)])
def test_the_official_mask_of_a_tall_embedding_is_decimated(shape: tuple[int, int], dtype: torch.dtype) -> None:
    plan = fm.explain(shape, fm.Official(0.7), dtype=dtype)
    assert (plan.backend, plan.form) == ("cpu", "decimated")
    assert plan.error_bound <= ERROR_LIMIT[torch.float32]
    assert plan.rows is not None
    assert plan.rows.nyquist


def test_a_background_that_no_column_has_is_refused() -> None:
    backend = CpuBackend()
    traits = backend.traits(torch.device("cpu"))
    assert traits is not None
    plans = candidates(fm.HighPass(0.4), (64, 64), torch.float32, "cpu", "cpu", traits)
    pruned = next(plan for plan in plans if plan.form == "pruned")
    x = torch.ones(64, 64)
    with pytest.raises(ValueError, match="background"):
        backend.prepare(replace(pruned, background=0.5)).run([x[None]], 1.0)
    assert torch.equal(x, torch.ones(64, 64))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (1, 9), (9, 1), (64, 8)], ids=str)
@pytest.mark.parametrize(
    "response",
    [
        fm.HighPass(0.3),
        fm.BandStop(0.02, 0.08),
        fm.BandPass(0.05, 0.3),
        fm.Butterworth(0.2),
        fm.Official(0.3),
        fm.Center(-2),
        fm.Custom(lambda ky, kx, shape: kx > 2),
    ],
    ids=lambda response: type(response).__name__,
)
def test_a_plan_knows_the_columns_of_one_gain(response: fm.Response, shape: tuple[int, int], transpose: bool) -> None:
    plan = replace(fm.explain(shape, response), transposed=transpose)
    mask = response.mask(shape).T if transpose else response.mask(shape)
    columns = mask[:, : mask.shape[1] // 2 + 1]
    expected = np.where((columns == columns[0]).all(axis=0), columns[0], np.nan)
    np.testing.assert_array_equal(plan.column_gains, expected)
    varying = int(np.isnan(expected).sum())
    assert f"{expected.size}: gain varies in {varying}," in str(replace(plan, form="full"))


def test_an_executable_of_the_cpu_knows_its_memory() -> None:
    small, large = (CpuBackend().prepare(fm.explain((n, n), fm.HighPass(0.4))) for n in (32, 512))
    assert 0 < small.nbytes < large.nbytes


def test_a_pruned_form_answers_for_the_gains_that_it_corrects_by() -> None:
    """M - background is larger than M where the gain changes its sign."""
    shape = (1052, 128)
    backend = CpuBackend()
    for response in (
        fm.BandGain(0.5, -1.0, 1.0, metric="normalized"),
        fm.BandGain(0.1, 1.0, -1.0),
        fm.Custom(fm.BandGain(0.5, -1.0, 1.0, metric="normalized").mask(shape)),
    ):
        mask = torch.from_numpy(response.mask(shape))
        traits = backend.traits(torch.device("cpu"))
        assert traits is not None
        plans = candidates(response, shape, torch.float32, "cpu", "cpu", traits)
        pruned = [plan for plan in plans if plan.form == "pruned"]
        for plan in pruned:
            x = noise(*shape)
            expected = torch.fft.ifft2(mask * torch.fft.fft2(x.double())).real
            backend.executable(plan).run([x], 1.0)
            error = (x.double() - expected).norm() / noise(*shape).double().norm()
            assert error <= plan.error_bound, plan
        assert pruned
