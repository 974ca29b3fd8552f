"""The full form in three kernels of the CUDA backend, run by the emulation: results, traffic, and bugs put into it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emulated
import freemerge as fm
from benchmarks.traffic import traffic
from freemerge.backends import registry
from freemerge.backends.cuda import CudaBackend
from freemerge.backends.torch import TorchBackend
from freemerge.errors import BackendError
from freemerge.planner.forms import candidates
from freemerge.planner.lengths import largest_prime, prime_factors
from freemerge.planner.plan import Plan
from freemerge.planner.tiles import Tiles, column_bytes, convolution, row_bytes, tiles
from freemerge.responses import Response
from in_memory import noise
from reference import reference_filter

BLOCK_BYTES = 227 << 10  # of an H100, and of the emulation
LENGTHS = (
    1,
    2,
    3,
    5,
    7,
    8,
    9,
    16,
    17,
    21,
    22,
    26,
    30,
    32,
    37,
    43,
    45,
    48,
    49,
    53,
    64,
    74,
    86,
    121,
)  # of parts, or widths
RESPONSES = (fm.HighPass(0.4), fm.LowPass(0.3), fm.Butterworth(0.2), fm.Official(0.7), fm.BandGain(0.1, 0.5, 1.5),
             fm.Center(-1))  # fmt: skip
ERROR = 5e-7


def plans_for(x: torch.Tensor, response: Response) -> list[Plan]:
    traits = emulated.backend().traits(x.device)
    assert traits is not None
    return candidates(response, tuple(x.shape[-2:]), x.dtype, str(x.device), "cuda", traits)


def plan_for(x: torch.Tensor, response: Response, chosen: Tiles | None = None) -> Plan:
    """The plan in three kernels of a matrix or batch, with the planner's tiles or others."""
    plan = next(plan for plan in plans_for(x, response) if plan.tiles is not None)
    return plan if chosen is None else replace(plan, tiles=chosen)


def run(plan: Plan, x: torch.Tensor, backend: CudaBackend | None = None) -> None:
    (backend or emulated.backend()).executable(plan).run([x if x.ndim == 3 else x[None]], 1.0)


def error(got: torch.Tensor, x: torch.Tensor, response: Response) -> float:
    """Relative to the input; in storage of 16 bits, what is more than the rounding of a correct result."""
    errors = [0.0]
    for y, matrix_ in zip(got.reshape(-1, *x.shape[-2:]), x.reshape(-1, *x.shape[-2:]), strict=True):
        want = reference_filter(matrix_, response)
        rounding = float((want.to(y.dtype).double() - want).norm())
        wrong = (float((y.double() - want).norm()) - 1.001 * rounding) / float(matrix_.double().norm())
        errors.append(math.inf if math.isnan(wrong) else wrong)
    return max(errors)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    parts=st.sampled_from((1, 2, 4, 8)),
    length=st.sampled_from(LENGTHS),
    width=st.sampled_from(LENGTHS),
    gap=st.integers(0, 3),
    shift=st.integers(0, 1),
    count=st.integers(1, 3),
    columns=st.sampled_from((4, 8, 16)),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
    response=st.sampled_from(RESPONSES),
    spare=st.sampled_from((None, None, 0, 1)),
)
def test_any_shape_stride_and_tiles_agree_with_float64(
    parts: int, length: int, width: int, gap: int, shift: int, count: int, columns: int, dtype: torch.dtype,
    response: Response, spare: int | None,
) -> None:  # fmt: skip
    height = parts * length
    stride = width + gap
    storage = noise(shift + count * height * stride, dtype=dtype)
    x = storage.as_strided((count, height, width), (height * stride, stride, 1), shift)
    if plans_for(x, response)[0].form in ("identity", "scale"):  # the gain is one constant on this shape
        return
    # Every length can be transformed by a convolution, those with kernels for their factors too.
    chirps = (convolution(n) if spare is None else 1 << (2 * n).bit_length() + spare for n in (width, length))
    plan = plan_for(x, response, Tiles(parts, columns, 64, 96 if 43 in (length, width) else 64, *chirps))
    before = storage.clone()
    run(plan, x)
    assert error(x, before.as_strided(x.shape, x.stride(), shift), response) < ERROR
    x.fill_(0)
    before.as_strided(x.shape, x.stride(), shift).fill_(0)
    assert torch.equal(storage, before)  # nothing between the rows was touched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1009, 37), (37, 1021), (2 * 769, 34), (1, 1009), (1, 9973), (2, 3, 2 * 1013), (5, 67, 67)], ids=str
)
@pytest.mark.parametrize("response", [fm.HighPass(0.3), fm.Butterworth(0.2)], ids=repr)
def test_primes_are_as_accurate_as_other_lengths(
    shape: tuple[int, ...], response: Response, dtype: torch.dtype
) -> None:
    x = noise(*shape, dtype=dtype)
    plan = plan_for(x, response)
    assert plan.tiles is not None
    assert plan.tiles.row_chirp or plan.tiles.column_chirp
    y = x.clone()
    run(plan, y)
    assert error(y, x, response) < ERROR


@pytest.mark.parametrize("prime", [1009, 9973])
def test_angles_of_a_chirp_are_exact_before_they_are_rounded(prime: int) -> None:
    """One bright entry at the end: a transform with k^2 in floats would turn it by a wrong angle."""
    x = torch.zeros(1, prime)
    x[0, -1] = 1.0
    plan = plan_for(x, fm.HighPass(0.3))
    y = x.clone()
    run(plan, y)
    assert error(y, x, fm.HighPass(0.3)) < ERROR


@pytest.mark.parametrize(
    ("shape", "chosen"),
    [
        ((3, 96, 86), Tiles(4, 8, 64, 96)),
        ((3, 74, 89), Tiles(2, 4, 64, 64, convolution(89), convolution(37))),
    ],
    ids=["passes", "convolutions"],
)
def test_threads_in_any_order_and_repetition_change_no_bit(shape: tuple[int, ...], chosen: Tiles) -> None:
    x, module, results = noise(*shape), emulated.module(), []
    plan = plan_for(x, fm.HighPass(0.3), chosen)
    try:
        for order in ("forward", "reverse", "random", "random"):
            module.set_order(getattr(module.Order, order))
            results.append(x.clone())
            run(plan, results[-1])
    finally:
        module.set_order(module.Order.forward)
    assert all(torch.equal(results[0], y) for y in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("response", [fm.HighPass(0.4), fm.Butterworth(0.2), fm.LowPass(0.3)], ids=repr)
@pytest.mark.parametrize(("height", "width"), [(64, 86), (64, 91), (64, 160), (64, 89), (74, 160), (74, 89)])
def test_the_traffic_model_counts_every_load_and_store(
    height: int, width: int, response: Response, dtype: torch.dtype
) -> None:
    module, x = emulated.module(), noise(height, width, dtype=dtype)
    plan = plan_for(x, response, Tiles(2, 4, 64, 64, convolution(width), convolution(height // 2)))
    executable = emulated.backend().executable(plan)
    executable.run([x.clone()[None]], 1.0)  # makes the tables
    module.watch(0, (1 << 63) - 1)
    module.watch(x.data_ptr(), x.numel() * x.element_size())
    executable.run([x[None]], 1.0)
    (_, stored), (loaded, _) = module.watched()
    module.unwatch_all()
    steps = traffic(plan).steps
    assert stored == sum(step.written for step in steps)
    in_matrix = sum(step.read for step in steps if step.where == "matrix")
    if dtype == torch.float32:  # so are the spectra, but for their last column
        last = 8 * height * (2 if math.isnan(plan.column_gains[-1]) or plan.column_gains[-1] != 1 else 1)
        in_matrix += sum(step.read for step in steps if step.where == "spectrum") - last
    assert loaded == in_matrix


def test_at_the_default_cutoff_it_moves_what_the_design_says() -> None:
    """Bytes an element: 40 for cuFFT in place with a mask between, 24 with fused columns."""
    emulated_traits = emulated.backend().traits(torch.device("cpu"))
    assert emulated_traits is not None

    def moved(shape: tuple[int, int], dtype: torch.dtype) -> float:
        found = candidates(fm.HighPass(0.4), shape, dtype, "cpu", "cuda", emulated_traits)
        return traffic(next(plan for plan in found if plan.tiles is not None)).per_element("matrix", "spectrum")

    assert moved((4096, 4096), torch.float32) == pytest.approx(22.4, abs=0.02)
    assert moved((4096, 4096), torch.bfloat16) == pytest.approx(18.4, abs=0.02)
    assert moved((4096, 11008), torch.float32) == pytest.approx(18.4, abs=0.02)
    assert moved((4096, 11008), torch.bfloat16) == pytest.approx(14.4, abs=0.02)


def test_fp32_spectra_take_the_matrix_itself() -> None:
    traits = emulated.backend().traits(torch.device("cpu"))
    assert traits is not None
    assert traits.workspace is not None
    shape = (2048, 2048)
    wide, narrow = (
        plan_for(torch.empty(shape, dtype=dtype), fm.HighPass(0.4)) for dtype in (torch.float32, torch.half)
    )
    assert traits.workspace(wide) == 8 * 2048
    assert traits.workspace(narrow) == 8 * 2048 * 1028


# --- coarse grids -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    monkeypatch.setenv("FREEMERGE_CUDA_TRANSFORMS", "own")
    return CudaBackend(emulated.runtime())


def coarse_plan(backend: CudaBackend, x: torch.Tensor, response: Response) -> Plan:
    traits = backend.traits(x.device)
    assert traits is not None
    found = candidates(response, tuple(x.shape[-2:]), x.dtype, str(x.device), "cuda", traits)
    return next(plan for plan in found if plan.form == "decimated")


@pytest.mark.parametrize(
    ("shape", "response"),
    [
        ((300, 90), fm.LowPass(0.05)),
        ((3, 128, 200), fm.LowPass(0.05)),  # an odd number of coarse columns, several matrices
        ((300, 90), fm.Official(0.05)),  # around Nyquist
        ((301, 90), fm.Official(0.05)),  # between two bins
        ((512, 31), fm.Butterworth(0.02)),  # a whole axis, by a convolution
        ((257, 1021), fm.HighPass(0.1)),
    ],
    ids=str,
)
def test_coarse_grids_need_no_cufft(own: CudaBackend, shape: tuple[int, ...], response: Response) -> None:
    x = noise(*shape)
    plan = coarse_plan(own, x, response)
    assert plan.tiles is not None
    ours, theirs, again = x.clone(), x.clone(), x.clone()
    emulated.standin_traffic()
    run(plan, ours, own)
    assert emulated.standin_traffic() == (0, 0)
    run(replace(plan, tiles=None), theirs, own)
    assert emulated.standin_traffic() != (0, 0)
    want = torch.stack([reference_filter(m, response) for m in x.reshape(-1, *shape[-2:])]).reshape(shape)
    changed = float((want - plan.background * x.double()).norm())  # what comes from the grid
    assert float((ours.double() - want).norm()) < 1.1 * float((theirs.double() - want).norm()) + 2e-7 * changed
    assert float((ours.double() - theirs.double()).norm()) < ERROR * max(changed, float(want.norm()))
    emulated.module().set_order(emulated.module().Order.random)
    try:
        run(plan, again, own)
    finally:
        emulated.module().set_order(emulated.module().Order.forward)
    assert torch.equal(ours, again)


def test_a_batch_of_coarse_grids_is_one_by_one_and_takes_no_work_area(own: CudaBackend) -> None:
    x, response = noise(70, 24, 40, dtype=torch.bfloat16), fm.HighPass(0.1)  # more than one launch takes
    plan = coarse_plan(own, x, response)
    together, alone = x.clone(), x.clone()
    run(plan, together, own)
    for y in alone:
        run(plan, y, own)
    assert torch.equal(together, alone)
    traits = own.traits(x.device)
    assert traits is not None
    assert traits.workspace is not None
    assert traits.workspace(plan) < traits.workspace(replace(plan, tiles=None))


@pytest.mark.parametrize(
    ("shape", "response"), [((256, 160), fm.HighPass(0.05)), ((301, 90), fm.Official(0.05))], ids=str
)
def test_the_traffic_model_counts_every_store_of_coarse_grids(
    own: CudaBackend, shape: tuple[int, int], response: Response
) -> None:
    module, x = emulated.module(), noise(*shape)
    plan = coarse_plan(own, x, response)
    stores = []
    for chosen in (plan, replace(plan, tiles=None)):
        executable = own.executable(chosen)
        executable.run([x.clone()[None]], 1.0)  # makes the tables
        emulated.standin_traffic()
        module.watch(0, (1 << 63) - 1)
        executable.run([x.clone()[None]], 1.0)
        stores.append(module.watched()[0][1] + emulated.standin_traffic()[1])
        module.unwatch_all()
    written = [
        sum(step.written for step in traffic(chosen).steps if step.name in names)
        for chosen, names in (
            (plan, ("rows_to_spectra", "column_filter", "spectra_to_rows")),
            (replace(plan, tiles=None), ("cuFFT R2C", "coarse_mask", "cuFFT C2R")),
        )
    ]
    assert stores[0] - stores[1] == written[0] - written[1]
    assert written[0] > 0


def test_explain_shows_how_the_coarse_grid_is_filtered(own: CudaBackend) -> None:
    with registry.using(own, TorchBackend()):
        plan = fm.explain((4096, 4096), fm.HighPass(0.05))
        assert plan.form == "decimated"
        assert "grid       rows to spectra, columns, and back: " in str(plan)
        assert "decimated 1.0" in plan.reason


# --- who chooses it ---------------------------------------------------------------------------------------------------


def test_auto_keeps_to_cufft_until_it_is_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    response, shape = fm.HighPass(0.4), (1024, 1024)
    with registry.using(emulated.backend(), TorchBackend()):
        plan = fm.explain(shape, response)
        assert (plan.backend, plan.form, plan.tiles) == ("cuda", "full", None)
        assert "full 1.0, full in three kernels 1.0" in plan.reason
    monkeypatch.setenv("FREEMERGE_CUDA_TRANSFORMS", "own")
    with registry.using(CudaBackend(emulated.runtime()), TorchBackend()):
        plan = fm.explain(shape, response)
        assert plan.tiles is not None
        assert "rows to spectra, columns, and back: 1 row (64 threads)" in str(plan)
        assert fm.explain((1009, 50257), response).tiles is None  # too long: cuFFT's
        primes = fm.explain((1009, 1013), response)
        assert "1 row (128 threads, by a convolution of 2048 points), 4 columns" in str(primes)
        assert "full in three kernels 1.0, full 1." in primes.reason  # cuFFT convolves through memory
        for x in (noise(96, 80), noise(89, 80)):
            assert error(fm.filtered(x, response), x, response) < ERROR
    monkeypatch.setenv("FREEMERGE_CUDA_TRANSFORMS", "fftw")
    with pytest.raises(BackendError, match="FREEMERGE_CUDA_TRANSFORMS must be cufft or own, not 'fftw'"):
        CudaBackend(emulated.runtime()).traits(torch.device("cpu"))


def test_tiles_state_the_shared_memory_that_kernels_take() -> None:
    shapes = [(2, 1), (768, 768), (4096, 4096), (4096, 11008), (14336, 4096), (11008, 344)]
    for height, width in [*shapes, (769, 768), (2018, 1021), (1, 1009)]:
        chosen = tiles(height, width, BLOCK_BYTES)
        assert chosen is not None
        assert emulated.module().tile_bytes(height, width, chosen) == (
            row_bytes(convolution(width) or width, chosen.parts),
            column_bytes(convolution(height // chosen.parts) or height // chosen.parts, chosen.columns),
        )
        assert emulated.module().block_bytes(0, 0) == BLOCK_BYTES


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        (Tiles(3, 8, 64, 64), "parts must be 1, 2, 4 or 8"),
        (Tiles(8, 8, 64, 64), "parts must divide the height"),
        (Tiles(4, 6, 64, 64), "a power of two"),
        (Tiles(4, 8, 512, 64), "a block of rows has too many threads"),
        (Tiles(4, 8, 64, 1024), "a block of columns has too many threads"),
        (Tiles(4, 8, 64, 64, row_chirp=75), "2 n - 1 points"),
        (Tiles(4, 8, 64, 64, column_chirp=4), "2 n - 1 points"),
        (Tiles(4, 8, 64, 64, row_chirp=88), "a prime factor for which there is no kernel"),
    ],
)
def test_tiles_without_kernels_are_refused(chosen: Tiles, why: str) -> None:
    x = noise(12, 40)
    with pytest.raises(ValueError, match=why):
        run(plan_for(x, fm.HighPass(0.4), chosen), x.clone())


@pytest.mark.parametrize("shape", [(64, 32768), (32000, 4096), (64, 14009), (50257, 768), (4099, 64)], ids=str)
def test_what_does_not_fit_has_no_tiles(shape: tuple[int, int]) -> None:
    """Rows or columns too long for the shared memory, or for that of their convolutions."""
    assert tiles(*shape, BLOCK_BYTES) is None


def test_a_convolution_has_room_for_the_chirp_and_kernels_for_its_factors() -> None:
    for length in range(1, 3000):
        points, primes = convolution(length), prime_factors(length)
        assert (points == 0) == (primes.count(43) < 2 and set(primes) <= {2, 3, 5, 7, 11, 13, 43})
        if points:
            assert 2 * length - 1 <= points < 4 * length
            assert largest_prime(points) <= 7
    assert convolution(1009) == 2048  # three passes, where 2025 = 3^4 5^2 takes six
    assert convolution(769) == 1792  # three passes, too


# --- bugs put into the kernels ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug(emulated.Bug):
    kernels: str = "row_spectra.cu"
    height: int = 64
    width: int = 86


BUGS = {
    "sign of the twiddles between rows": Bug(
        "row_spectra.cu",
        "turns[p] = load(a.tables.turns + group.first * p);",
        "{ turns[p] = load(a.tables.turns + group.first * p); turns[p].y = -turns[p].y; }",
    ),
    "sign of a twiddle in a line": Bug("shared_fft.cuh", "load(roots + angle * p)", "load(roots)"),
    "last column in the row": Bug("spectrum_column.cuh", "bin == spectra.width / 2;", "false;"),
    "no barrier after reading rows": Bug("row_spectra.cu", "__syncthreads();\n  transform", "transform"),
    "no barrier after a pass": Bug("shared_fft.cuh", "  __syncthreads();\n", ""),
    "a row beyond the last": Bug(
        "row_spectra.cu", "if (kParts > 1 || group.has(s)) spectrum.put", "spectrum.put", height=65
    ),
    "points beyond a line that keep what was there": Bug(
        "chirp_transform.cuh",
        "value = b.block < chirp.length ? multiply(value, load(chirp.factors + b.block)) : make_float2(0.0f, 0.0f);",
        "if (b.block < chirp.length) value = multiply(value, load(chirp.factors + b.block));",
        width=89,
    ),
    "a chirp that is not undone": Bug(
        "chirp_transform.cuh", "multiply(swapped(value), load(chirp.factors + b.block))", "swapped(value)", width=89
    ),
    "no barrier before the chirp's passes": Bug(
        "chirp_transform.cuh", "__syncthreads();\n  transform<false>", "transform<false>", width=89
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_the_row_kernels_is_caught(name: str, tmp_path: Path) -> None:
    response, height, width = fm.HighPass(0.4), BUGS[name].height, BUGS[name].width
    chosen = Tiles(1 if height % 2 else 4, 8, 64, 64, convolution(width), 0)
    storage = noise(height + 2, width)  # room for what a bug writes beyond the end
    x = storage[:height]
    plan = plan_for(x, response, chosen)

    def is_right(backend: CudaBackend) -> bool:
        memory = storage.clone()
        run(plan, memory[:height], backend)
        untouched = torch.equal(memory[height:], storage[height:])
        return untouched and error(memory[:height], x, response) < ERROR

    assert is_right(emulated.backend())
    assert not is_right(emulated.backend_with(BUGS[name], tmp_path))
