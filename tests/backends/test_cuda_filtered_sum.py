"""Sum and filter of the CUDA backend in one go, run by the emulation: results, traffic, and bugs put into it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emulated
import freemerge as fm
from benchmarks.traffic import MODELS_IN_ONE_PASS, merge_traffic, traffic
from freemerge import accumulate
from freemerge.accumulate import LateSum, add_round, filtered_sum, finished, norm, task_vector_sum
from freemerge.backends import cuda, registry
from freemerge.backends.cuda import CudaBackend
from freemerge.backends.torch import TorchBackend
from freemerge.checkpoint import TensorSpec
from freemerge.errors import ArgumentError, BackendError, CheckpointError
from freemerge.merging.units import plan_units
from freemerge.methods import Merged
from freemerge.planner.costs import Traits
from freemerge.planner.forms import candidates
from freemerge.planner.plan import Plan
from freemerge.planner.tiles import Tiles, convolution, tiles
from freemerge.planner.windows import half_bin
from freemerge.responses import Response
from in_memory import finished_sum, noise
from reference import reference_filter, reference_merge

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
ORDERS = ("forward", "reverse", "random")


class Decimating(CudaBackend):
    """Prefers the decimated form wherever there is one, as for large matrices."""

    def _traits_of(self, device: torch.device) -> Traits:
        traits = super()._traits_of(device)
        return replace(traits, costs=replace(traits.costs, row_fft=1.0))


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """With memory of the allocator that holds NaN before it is written, as floats or doubles."""
    torch.use_deterministic_algorithms(True)
    with registry.using(Decimating(emulated.runtime()), TorchBackend()):
        yield
    torch.use_deterministic_algorithms(False)
    emulated.module().set_order(emulated.module().Order.forward)


class Full(CudaBackend):
    """Has no decimated form."""

    def _traits_of(self, device: torch.device) -> Traits:
        traits = super()._traits_of(device)
        return replace(traits, forms=traits.forms - {"decimated"})


@pytest.fixture(params=["decimated", "coarse", "full"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The only one that is chosen: the decimated form by cuFFT, the same with grids that go through three kernels, and
    the full form in three kernels."""
    monkeypatch.setenv("FREEMERGE_CUDA_TRANSFORMS", "cufft" if request.param == "decimated" else "own")
    with registry.using((Full if request.param == "full" else Decimating)(emulated.runtime()), TorchBackend()):
        yield request.param


def inputs(shape: tuple[int, ...], count: int, *, mean: float = 0.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and models of mixed dtypes."""
    base = noise(*shape, dtype=DTYPES[count % 3])
    models = [(mean + noise(*shape, seed=i + 1)).to(DTYPES[i % 3]) for i in range(count)]
    return base, models


def weights_of(count: int) -> list[float]:
    return [0.3 * (-1) ** i + 0.1 * i for i in range(count)]


def decimated_plan(shape: tuple[int, int], response: Response, *, own: bool = False) -> Plan:
    traits = emulated.backend().traits(torch.device("cpu"))
    assert traits is not None
    found = candidates(response, shape, torch.float32, "cpu", "cuda", traits)
    plan = next(plan for plan in found if plan.form == "decimated")
    return replace(plan, tiles=tiles(*coarse_shape(plan), traits.block_bytes)) if own else plan


def coarse_shape(plan: Plan) -> tuple[int, int]:
    """Of the grid that is transformed."""
    assert plan.rows is not None
    assert plan.columns is not None
    return plan.rows.cells * (2 if half_bin(plan.matrix[0], plan.rows) else 1), plan.columns.cells


SHAPES = {
    "wide": ((48, 700), fm.HighPass(0.1)),
    "tall": ((700, 48), fm.HighPass(0.1)),
    "odd width": ((130, 97), fm.HighPass(0.1)),
    "odd width beyond a block": ((96, 513), fm.LowPass(0.1)),
    "beyond a block": ((97, 516), fm.LowPass(0.1)),
    "primes": ((257, 131), fm.HighPass(0.05)),
    "few rows": ((20, 331), fm.HighPass(0.2)),
    "chunks": ((1030, 264), fm.HighPass(0.05)),
    "around Nyquist": ((300, 92), fm.Official(0.05)),
    "between two bins": ((301, 92), fm.Official(0.05)),
    "whole columns": ((512, 31), fm.Butterworth(0.02)),
    "whole columns in quads": ((512, 32), fm.Butterworth(0.02)),
    "a batch of one": ((1, 96, 130), fm.HighPass(0.05)),
}


@pytest.mark.parametrize("count", [1, 2, 8, 16])
@pytest.mark.parametrize("case", SHAPES)
def test_sum_and_filter_at_once_are_both_one_after_the_other(case: str, count: int) -> None:
    shape, response = SHAPES[case]
    (base, models), weights = inputs(shape, count), weights_of(count)
    want, want_means = task_vector_sum(base, models, weights)
    exact = sum(
        ((model.double() - base.double()) * weight for model, weight in zip(models, weights, strict=True)),
        start=torch.zeros(shape, dtype=torch.float64),
    )
    want_before = norm([want])
    fm.filter_(want, response)
    oracle = reference_filter(exact.reshape(shape[-2:]), response).reshape(shape)
    for order in ORDERS:
        emulated.module().set_order(getattr(emulated.module().Order, order))
        got, means, norms = finished_sum(base, models, weights, response)
        assert torch.equal(got, want)
        assert means == pytest.approx(want_means, rel=1e-12)
        assert norms == (pytest.approx(want_before, rel=1e-12), pytest.approx(norm([want]), rel=5e-7))
    loudest = float(response.mask(shape[-2:]).max())
    assert float((got - oracle).norm()) < 1e-6 * max(float(oracle.norm()), loudest * float(exact.norm()))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    parts=st.sampled_from((1, 2, 4, 8)),
    length=st.sampled_from((1, 3, 8, 13, 37, 64)),
    width=st.sampled_from((1, 2, 7, 31, 43, 64, 257, 300)),
    threads=st.sampled_from((64, 96, 160)),
    count=st.sampled_from((1, 2, 5, 16)),
    order=st.sampled_from(ORDERS),
    response=st.sampled_from((fm.HighPass(0.4), fm.LowPass(0.3), fm.Butterworth(0.2), fm.Official(0.7))),
)
def test_the_full_form_in_three_kernels_forms_its_sum_and_adds_its_base(
    parts: int, length: int, width: int, threads: int, count: int, order: str, response: Response
) -> None:
    shape = (parts * length, width)
    (base, models), weights = inputs(shape, count), weights_of(count)
    plan = three_kernels(shape, response, Tiles(parts, 4, threads, 96, convolution(width), convolution(length)))
    if plan is None:  # the gain is one constant on this shape
        return
    backend, module = emulated.backend(), emulated.module()
    want, want_means = task_vector_sum(base, models, weights)
    want_before = norm([want])
    backend.executable(plan).run([want[None]], 1.0)
    found = backend.filtered_sum(plan, base, models, weights, torch.full(shape, math.nan))
    assert found is not None
    module.set_order(getattr(module.Order, order))
    means, before, after, total = (
        backend.filtered_sum(plan, base, models, weights, torch.full(shape, math.nan)) or found
    )
    assert (means, before, after) == found[:3]  # whatever the order of threads and blocks
    assert means == pytest.approx(want_means, rel=1e-12)
    assert (math.sqrt(before), math.sqrt(after)) == pytest.approx((want_before, norm([want])), rel=5e-7)
    if isinstance(total, LateSum):
        for dtype in DTYPES:
            step_by_step = add_round(base, want, 0.7, dtype, factor=1.1)
            merged = torch.zeros(parts * length + 2, width, dtype=dtype)
            taken = total.add_round(merged[:-2], base, 0.7, 1.1)
            assert taken is (width % 4 == 0)
            assert not taken or torch.equal(merged[:-2], step_by_step)
            assert not merged[-2:].any()
    else:  # next to nothing is left
        assert after < 1.1e-5 * before
    assert torch.equal(finished(total), want)
    module.set_order(module.Order.forward)


def three_kernels(shape: tuple[int, int], response: Response, chosen: Tiles | None = None) -> Plan | None:
    traits = emulated.backend().traits(torch.device("cpu"))
    assert traits is not None
    found = candidates(response, shape, torch.float32, "cpu", "cuda", traits)
    full = [plan for plan in found if plan.form == "full" and plan.tiles is not None]
    return replace(full[0], tiles=chosen or full[0].tiles) if full else None


# --- the last pass, which adds the base ------------------------------------------------------------------------------


def late_by(
    backend: CudaBackend, plan: Plan, base: torch.Tensor, models: list[torch.Tensor], out: torch.Tensor
) -> LateSum:
    found = backend.filtered_sum(plan, base, models, weights_of(len(models)), out)
    assert found is not None
    assert isinstance(found[3], LateSum)
    return found[3]


@pytest.mark.parametrize("count", [2, 16])
@pytest.mark.parametrize("case", SHAPES)
def test_the_last_pass_adds_the_base(case: str, count: int, form: str) -> None:
    shape, response = SHAPES[case]
    plan = fm.explain(shape, response)
    assert (plan.form, plan.tiles is None) == ("full" if form == "full" else "decimated", form == "decimated")
    (base, models), weights = inputs(shape, count), weights_of(count)
    want, _ = task_vector_sum(base, models, weights)
    before = norm([want])
    fm.filter_(want, response)
    seen = set()
    for order, dtype in zip(ORDERS, DTYPES, strict=True):
        emulated.module().set_order(getattr(emulated.module().Order, order))
        late, _, norms = filtered_sum(base, models, weights, response)
        assert isinstance(late, LateSum)
        assert norms is not None
        seen.add(norms)
        step_by_step = add_round(base, want, 0.7, dtype, factor=1.1)
        assert torch.equal(add_round(base, late, 0.7, dtype, factor=1.1), step_by_step)
        over = base.clone()
        assert torch.equal(
            add_round(over, late, 0.7, base.dtype, factor=1.1, out=over),
            add_round(base, want, 0.7, base.dtype, factor=1.1),
        )
        assert late.add_round(torch.empty_like(over), base, 0.7, 1.1) is (shape[-1] % 4 == 0)
        assert torch.equal(late.tensor, want)
        assert not late.add_round(over, base, 0.7, 1.1)
        assert torch.equal(add_round(base, late, 0.7, dtype, factor=1.1), step_by_step)
    (norms,) = seen  # whatever the order of threads and blocks
    assert norms == (pytest.approx(before, rel=1e-12), pytest.approx(norm([want]), rel=1e-6))


def test_a_base_that_the_last_pass_does_not_take_is_added_after_it(form: str) -> None:
    base, models = inputs((96, 128), 2)
    want, *_ = finished_sum(base, models, [0.5, 0.5], fm.HighPass(0.05))
    shifted = torch.cat([base.flatten()[:3], base.flatten()])[3:].view(base.shape)
    for other in (base.double(), shifted):
        late, *_ = filtered_sum(base, models, [0.5, 0.5], fm.HighPass(0.05))
        assert isinstance(late, LateSum)
        assert not late.add_round(torch.empty_like(base), other, 0.7, 1.1)
        assert torch.equal(add_round(other, late, 0.7, other.dtype), add_round(other, want, 0.7, other.dtype))
        assert torch.equal(late.tensor, want)


@pytest.mark.parametrize("response", [fm.HighPass(0.1), fm.LowPass(0.1)], ids=str)
def test_the_norm_of_a_wave_is_known(response: Response, form: str) -> None:
    """What a transform does to a single wave does not average out."""
    base, rows, columns = torch.zeros(96, 132), torch.arange(96)[:, None], torch.arange(132)[None]
    background = 0.0 if form == "full" else fm.explain(base, response).background
    for y, x in ((0, 0), (0, 3), (5, 0), (1, 2), (91, 4), (8, 5), (6, 6), (48, 0), (3, 66), (40, 61)):
        wave = torch.cos(2 * math.pi * (rows * y / 96 + columns * x / 132) + 0.4)
        total, _, norms = filtered_sum(base, [wave], [1.0], response)
        left = norm([finished(total)])
        assert norms == pytest.approx((norm([wave]), left), rel=5e-7)
        # Of what a background keeps, little that is left is a difference.
        assert isinstance(total, LateSum) is (left**2 > (0.2 * background**2 + 1e-5) * norms[0] ** 2)


@pytest.mark.parametrize("gains", [(1.0, 1e22), (1e22, 1.0)])
def test_gains_whose_squares_are_no_numbers_of_float32(gains: tuple[float, float], form: str) -> None:
    base, models = noise(96, 132), [noise(96, 132, seed=i) for i in (1, 2)]
    response = fm.BandGain(0.05, *gains)
    total, _, norms = filtered_sum(base, models, [0.5, 0.5], response)
    want = norm([fm.filtered((torch.stack(models).mean(0) - base).double(), response, backend="torch")])
    assert norms is not None
    assert norms[1] == pytest.approx(want, rel=1e-5)
    assert norms[1] == pytest.approx(norm([finished(total)]), rel=1e-5)


@pytest.mark.parametrize(
    ("left", "response"),
    [(0.03, fm.HighPass(0.05)), (1e-4, fm.HighPass(0.05)), (0.0, fm.HighPass(0.05)), (0.0, fm.LowPass(0.05))],
    ids=str,
)
def test_where_little_is_left_its_norm_is_taken(left: float, response: Response, form: str) -> None:
    """A wave that the filter removes, and so much noise."""
    shape = (96, 130)
    rows, columns = torch.arange(96)[:, None], torch.arange(130)[None]
    turns = (rows / 96 + 2 * columns / 130) if isinstance(response, fm.HighPass) else (rows + columns) / 2
    model = torch.cos(2 * math.pi * turns + 0.3) + left * noise(*shape)
    base = torch.zeros(shape)
    total, _, norms = filtered_sum(base, [model], [1.0], response)
    known = form == "full" and left == 0.03  # which has no difference to take
    assert isinstance(total, LateSum) is known
    total = finished(total)
    assert norms == pytest.approx((norm([model]), norm([total])), rel=5e-7 if known else 1e-12)
    filtered = fm.filtered(model, response)
    assert torch.equal(total, filtered)


@pytest.mark.parametrize(
    "recipe",
    [
        fm.Recipe(response=fm.HighPass(0.1)),
        fm.Recipe(response=fm.LowPass(0.1), scale=2.5),
        fm.Recipe(response=fm.Official(0.1), weights="uniform"),
        fm.Recipe(response=fm.Butterworth(0.02)),
        fm.Recipe(response=fm.HighPass(0.1), renormalize=None, scale="interference"),
        fm.Recipe(response=fm.HighPass(0.1), out_dtype="float32"),
    ],
    ids=str,
)
def test_a_merge_is_the_same_whenever_the_last_pass_runs(
    recipe: fm.Recipe, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"a.weight": (96, 132), "b.weight": (512, 31), "c.weight": (1, 64, 92), "norm.weight": (24,)}
    base = {name: noise(*shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    models = [
        {name: (x.double() + 0.1 * noise(*x.shape, seed=seed)).to(x.dtype) for name, x in base.items()}
        for seed in (1, 2, 3)
    ]
    merged = fm.merge(base, models, recipe, backend="cuda")
    alone = fm.merge_tensors(base["a.weight"], [model["a.weight"] for model in models], recipe=recipe)
    late = 0

    def at_once(*args: object, **named: object) -> tuple[torch.Tensor, list[float], tuple[float, float] | None]:
        nonlocal late
        total, means, norms = filtered_sum(*args, **named)  # type: ignore[arg-type]
        late += isinstance(total, LateSum)
        if norms is not None:
            assert norms[1] == pytest.approx(norm([finished(total)]), rel=1e-6)
        return finished(total), means, norms

    monkeypatch.setattr(accumulate, "filtered_sum", at_once)
    for name, x in fm.merge(base, models, recipe, backend="cuda").items():
        assert torch.equal(x, merged[name])
    assert late >= 1
    again = fm.merge_tensors(base["a.weight"], [model["a.weight"] for model in models], recipe=recipe)
    assert torch.equal(again, alone)


def test_what_is_merged_can_be_read_before_it_is_added(form: str) -> None:
    base, models = noise(96, 130), [noise(96, 130, seed=i) for i in (1, 2)]
    want, _, norms = finished_sum(base, models, [0.5, 0.5], fm.HighPass(0.05))
    late, *_ = filtered_sum(base, models, [0.5, 0.5], fm.HighPass(0.05))
    assert norms is not None
    assert isinstance(late, LateSum)
    assert not torch.allclose(late._memory, want)
    merged = Merged([late], factor=2.0)
    assert torch.equal(merged.tensors[0], want)
    assert torch.equal(merged.complete().tensors[0], want * 2.0)


def test_a_last_pass_that_was_cut_off_does_not_run_again(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    late, *_ = filtered_sum(noise(96, 130), [noise(96, 130, seed=1)], [0.5], fm.HighPass(0.05))
    assert isinstance(late, LateSum)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cuda._Filter, "keep_for", interrupt)
        with pytest.raises(KeyboardInterrupt):
            late.finish()
    with pytest.raises(BackendError, match="the last pass of this sum was interrupted"):
        late.tensor.sum()


def test_a_result_that_is_not_finite_is_found() -> None:
    base = {"a.weight": noise(96, 130, dtype=torch.float16)}
    models = [{"a.weight": (x + noise(96, 130, seed=1)).half()} for x in base.values()]
    with pytest.raises(CheckpointError, match=r"merged model at scale 1e\+06 in float16: tensor 'a.weight'"):
        fm.merge(base, models, fm.Recipe(response=fm.HighPass(0.05), scale=1e6), backend="cuda")


def test_a_dominant_mean_is_that_of_the_sum(form: str) -> None:
    base, models = inputs((128, 200), 3, mean=500.0)
    weights = [0.2, 0.3, 0.5]
    want, _ = task_vector_sum(base, models, weights)
    fm.filter_(want, fm.HighPass(0.05))
    got, *_ = finished_sum(base, models, weights, fm.HighPass(0.05))
    assert torch.equal(got, want)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_means_tell_which_model_is_not_finite(value: float, form: str) -> None:
    base, models = inputs((96, 130), 3)
    models[1][95, 129] = value
    _, means, norms = finished_sum(base, models, [0.2, 0.3, 0.5], fm.HighPass(0.05))
    assert [math.isfinite(mean) for mean in means] == [True, False, True]
    assert norms is not None
    assert not any(map(math.isfinite, norms))
    states = [{"a.weight": model.float()} for model in models]
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        fm.merge({"a.weight": base.float()}, states, fm.Recipe(response=fm.HighPass(0.05), weights="uniform"))


@pytest.mark.parametrize(
    ("shape", "count", "response"),
    [
        ((96, 130), 17, fm.HighPass(0.05)),  # more models than one launch takes
        ((2, 96, 130), 2, fm.HighPass(0.05)),  # a batch
        ((2, 1, 96, 130), 2, fm.HighPass(0.05)),
        ((96, 130), 2, fm.Butterworth(0.4)),  # the full form by cuFFT
        ((96, 130), 2, fm.HighPass(0.0)),  # nothing to filter
        ((500,), 2, fm.HighPass(0.1)),  # a row
        ((0, 5), 2, fm.HighPass(0.1)),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take_is_summed_only(shape: tuple[int, ...], count: int, response: Response) -> None:
    (base, models), weights = inputs(shape, count), weights_of(count)
    want, want_means = task_vector_sum(base, models, weights)
    got, means, norms = finished_sum(base, models, weights, response)
    assert norms is None
    assert torch.equal(got, want)
    assert means == want_means


def test_strided_and_shifted_inputs_are_taken() -> None:
    base, models = inputs((96, 130), 3)
    want, _, want_norms = finished_sum(base, models, [0.2, 0.3, 0.5], fm.HighPass(0.05))
    storage = [torch.cat([x.flatten()[:3], x.flatten()])[3:].view(96, 130) for x in (base, models[0])]
    turned = [model.mT.contiguous().mT for model in models[1:]]
    got, _, norms = finished_sum(storage[0], [storage[1], *turned], [0.2, 0.3, 0.5], fm.HighPass(0.05))
    assert norms is not None
    assert norms == want_norms
    assert torch.equal(got, want)


def test_wrong_arguments_are_named() -> None:
    x = noise(8, 8)
    with pytest.raises(ArgumentError, match="weights must hold one number per model, got 2 for 1"):
        finished_sum(x, [x], [1.0, 2.0], fm.HighPass(0.1))
    plan = decimated_plan((96, 130), fm.HighPass(0.05))
    native, module = emulated.backend().executable(plan).native, emulated.module()  # type: ignore[attr-defined]
    y = noise(96, 130)
    for count, strides, why in ((0, [130], "models"), (1, [131], "rows lie end to end")):
        job = module.SumFirst(y.data_ptr(), 0, [y.data_ptr()] * count, [0] * count, [1.0] * count, y.numel(), 0)
        with pytest.raises(ValueError, match=why):
            native.workspace_bytes([y.data_ptr()], strides, 0, 0, job)
    full = replace(plan, form="full", rows=None, columns=None)
    job = module.SumFirst(y.data_ptr(), 0, [y.data_ptr()], [0], [1.0], y.numel(), 0)
    with pytest.raises(ValueError, match="whose first pass is ours"):
        emulated.backend().executable(full).native.workspace_bytes(  # type: ignore[attr-defined]
            [y.data_ptr()], [130], 0, 0, job
        )
    with pytest.raises(ValueError, match="as many as one launch takes"):
        module.SumFirst(y.data_ptr(), 0, [y.data_ptr()] * 17, [0] * 17, [1.0] * 17, y.numel(), 0)


@pytest.mark.parametrize("transforms", ["cufft", "own"])
@pytest.mark.parametrize("renormalize", ["energy", None])
def test_a_merge_sums_and_filters_at_once(
    renormalize: str | None, transforms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FREEMERGE_CUDA_TRANSFORMS", transforms)
    backend = Decimating(emulated.runtime()) if transforms == "cufft" else CudaBackend(emulated.runtime())
    shapes = {"a.weight": (96, 130), "b.weight": (130, 70), "norm.weight": (24,)}
    base = {name: noise(*shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    models = [
        {name: (x.double() + 0.1 * noise(*x.shape, seed=seed)).to(x.dtype) for name, x in base.items()}
        for seed in (1, 2, 3)
    ]
    recipe = fm.Recipe(response=fm.HighPass(0.1 if transforms == "cufft" else 0.4), renormalize=renormalize)
    monkeypatch.delattr("freemerge.filter.filter_")  # nobody needs it
    with registry.using(backend, TorchBackend()):
        merged = fm.merge(base, models, recipe, backend="cuda")
    specs = {name: TensorSpec(name, tuple(x.shape), x.dtype) for name, x in base.items()}
    want = reference_merge(base, models, recipe, plan_units(specs, recipe.select, recipe.views))
    for name, x in merged.items():
        assert float((x.double() - want[name]).norm()) < 4e-3 * float(want[name].norm())


# --- traffic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_a_merge_of_eight_models_moves_what_the_table_says(own: bool) -> None:
    """Base and models once, the sum once each way, and base and result: 2 (K + 1) + 8 bytes, and 4."""
    module, shape, count = emulated.module(), (1024, 512), 8
    backend, plan = emulated.backend(), decimated_plan(shape, fm.HighPass(0.05), own=own)
    base, *models = (noise(*shape, dtype=torch.bfloat16, seed=i) for i in range(count + 1))
    out, merged = torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16)
    backend.filtered_sum(plan, base, models, weights_of(count), out)  # makes the tables
    for tensor in (base, *models, out, merged):
        module.watch(tensor.data_ptr(), tensor.nbytes)
    late = late_by(backend, plan, base, models, out)
    add_round(base, late, 0.7, torch.bfloat16, factor=1.1, out=merged, backend="cuda")
    counted = module.watched()
    module.unwatch_all()
    n, sample = base.numel(), 2 * 16 * 64  # of each tensor, for the dominant mean
    assert counted[0] == (2 * n + sample + 2 * n, 0)
    assert counted[1:-2] == [(2 * n + sample, 0)] * count
    assert counted[-2:] == [(4 * n, 4 * n), (0, 2 * n)]
    moved = sum(map(sum, counted)) - (count + 1) * sample
    assert moved == n * (2 * (count + 1) + 8 + 4)
    assert moved == merge_traffic(plan, count, torch.bfloat16).bytes("matrix")


@pytest.mark.parametrize("response", [fm.HighPass(0.4), fm.Butterworth(0.2)], ids=repr)
def test_in_three_kernels_the_sum_is_never_in_memory(response: Response) -> None:
    """The spectra of all rows are written and read once, those of columns that the filter changes once more."""
    module, shape, count = emulated.module(), (64, 160), 3
    backend, plan = emulated.backend(), three_kernels(shape, response)
    assert plan is not None
    assert plan.tiles is not None
    base, *models = (noise(*shape, dtype=torch.bfloat16, seed=i) for i in range(count + 1))
    out, merged = torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16)
    backend.filtered_sum(plan, base, models, weights_of(count), out)  # makes the tables
    module.watch(0, (1 << 63) - 1)
    for tensor in (base, *models, merged, out):
        module.watch(tensor.data_ptr(), tensor.nbytes)
    late = late_by(backend, plan, base, models, out)
    assert late.add_round(merged, base, 0.7, 1.1)
    (_, stored), of_base, *inputs, of_merged, (loaded, _) = module.watched()
    module.unwatch_all()
    n = out.numel()
    assert (of_base, of_merged) == ((2 * n + 2 * n, 0), (0, 2 * n))
    assert inputs == [(2 * n, 0)] * count
    steps = merge_traffic(plan, count, torch.bfloat16).steps
    groups = math.ceil(shape[0] / max(plan.tiles.parts, 2))
    row_warps = groups * plan.tiles.row_threads // 32
    blocks = range(0, plan.column_gains.size, plan.tiles.columns)
    varying = sum(bool(np.isnan(plan.column_gains[first:][: plan.tiles.columns]).any()) for first in blocks)
    column_warps = varying * plan.tiles.parts * plan.tiles.column_threads // 32
    sums = 8 * ((count + 2) * (row_warps + 1) + column_warps)  # and of all rows together
    assert stored == sum(step.written for step in steps) + sums
    last = 8 * shape[0] * (2 if math.isnan(plan.column_gains[-1]) or plan.column_gains[-1] != 1 else 1)
    assert loaded == sum(step.read for step in steps if step.where == "spectrum") - last


def test_the_default_cutoff_of_eight_models_moves_what_the_table_says() -> None:
    for width, columns in ((4096, 6.4), (11008, 2.4)):
        plan = three_kernels((4096, width), fm.HighPass(0.4))
        assert plan is not None
        moved = merge_traffic(plan, 8, torch.bfloat16).per_element("matrix", "spectrum")
        assert moved == pytest.approx(2 * 9 + 4 + columns + 4 + 2 * 2, abs=0.05)


def test_panels_are_those_of_the_filter_alone() -> None:
    """What the first pass writes for the second is no more than without the sum, beside a number for each block."""
    module, shape, count = emulated.module(), (512, 512), 3
    backend, plan = emulated.backend(), decimated_plan(shape, fm.HighPass(0.05))
    assert plan.rows is not None
    base, *models = (noise(*shape, seed=i) for i in range(count + 1))
    out, stored = torch.empty(shape), []
    for run in (
        lambda: backend.executable(plan).run([out], 1.0),
        lambda: late_by(backend, plan, base, models, out).finish(),
    ):
        run()
        module.watch(0, (1 << 63) - 1)
        run()
        stored.append(module.watched()[0][1])
        module.unwatch_all()
    blocks = 2 * 16  # of 256 columns, in chunks of 32 rows
    sums = 8 * ((count + 1) * blocks + plan.rows.cells + count + 2)  # and of each row of bins, and of all
    assert stored[1] - stored[0] == out.nbytes + 4 * 16 * 64 + sums


def test_more_models_take_the_separate_passes() -> None:
    plan = decimated_plan((1024, 512), fm.HighPass(0.05))
    assert emulated.module().MODELS_PER_LAUNCH == MODELS_IN_ONE_PASS
    one, two = (merge_traffic(plan, count, torch.bfloat16) for count in (16, 17))
    # A model, the filter's read and write, two norms, and the sum once more to be added.
    assert two.bytes() - one.bytes() == 1024 * 512 * (2 + 2 * 4 + 2 * 4 + 4)
    assert traffic(plan).bytes("panel") == one.bytes("panel") == two.bytes("panel")


# --- bugs put into the kernels ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug(emulated.Bug):
    kernels: str = "spread_sum.cu"
    form: str = "decimated"
    width: int = 301
    height: int = 97


def in_rows(right: str, wrong: str, width: int = 301) -> Bug:
    return Bug("row_spectra.cu", right, wrong, "row_spectra.cu", "full", width)


def in_columns(right: str, wrong: str, form: str = "full", kernels: str = "column_filter.cu") -> Bug:
    return Bug(kernels, right, wrong, kernels, form, 300, 100)


LINES = "  transform_lines<kBy>(lines, a.tables);\n  if (a.vectors.count > 0) put_kept"
BUGS = {
    "base of the first row": Bug(
        "weighted_sum.cuh", "widen(fetch(vectors.base, first, end)", "widen(fetch(vectors.base, first % 97, end)"
    ),
    "weight of the neighbour": Bug("weighted_sum.cuh", "vectors.weights[m]", "vectors.weights[m ? m - 1 : 1]"),
    "the first model twice": Bug("weighted_sum.cuh", "fetch(vectors.models[m + 1]", "fetch(vectors.models[m]"),
    "squares of another chunk": Bug("spread_sum.cu", "chunk * gridDim.x", "(chunk ? chunk - 1 : 0) * gridDim.x"),
    "sums of another block": Bug("spread_sum.cu", "chunk * gridDim.x + blockIdx.x", "chunk * gridDim.x"),
    "the row of another warp": Bug("spread_sum.cu", "tile + i * kColumnsPerBlock + kEntries", "tile + kEntries"),
    "no barrier after the sum": Bug("spread_sum.cu", "__syncthreads();\n    if (has_columns)", "if (has_columns)"),
    "no barrier before the next sum": Bug("spread_sum.cu", "__syncthreads();\n  }\n  if (has", "}\n  if (has"),
    "the mean left in": Bug("spread_sum.cu", "entries[c] -= center", "entries[c] -= 0"),
    "a sample beside its place": Bug("spread_sum.cu", "i % a.columns * a.column_step", "i % a.columns"),
    "a row that is not there": in_rows("if (group.has(slot)) {", "{"),
    "magnitudes of another model": in_rows("if (lane == m) kept", "if (lane == 0) kept"),
    "squares instead of magnitudes": in_rows("lane == a.vectors.count) kept", "lane == 0) kept"),
    "sums of another warp": in_rows("+ threadIdx.x / kWarpSize, sum", ", sum"),
    "the real part twice": in_rows("slot % 2 == 0 ? point.x", "true ? point.x"),
    "columns of the next row": in_rows("row + column, row + width, true", "row + column, row + width + 8, true"),
    "the base of the upper row": in_rows("(entries + rows[1] + column)) :", "(entries + rows[0] + column)) :", 300),
    "a base added to a row that is not there": in_rows("if (i == 1 && !has_lower) break;", "", 300),
    "the factor after the base": in_rows("a.factor * point.x);", "point.x);", 300),
    "kept squares of the last point": in_rows("sum += static_cast<double>(kept)", "sum = static_cast<double>(kept)"),
    "kept squares of bins beyond Nyquist": in_rows("(2 * column <= width ? column : width - column)",
                                                   "(2 * column <= width ? column : 0)"),
    "kept squares of one row": in_rows("(squared(point.x) + squared(point.y));", "(2.0 * squared(point.x));"),
    "kept squares among those before": in_rows("a.vectors.count + 1, sum", "a.vectors.count, sum"),
    "kept blocks with columns that vary": in_columns("std::none_of(first, end", "!std::all_of(first, end",
                                                     kernels="three_kernels.cpp"),
    "energy of whole columns": in_columns("* tiles.parts);\n  if (energies", ");\n  if (energies",
                                          kernels="three_kernels.cpp"),
    "energies of blocks that put nothing down": in_columns("energies.sums, 0, bytes", "energies.sums, 0, 0 * bytes",
                                                           kernels="three_kernels.cpp"),
    "energy of columns without their mirrors": in_columns("2.0 * a.energy_share", "a.energy_share"),
    "energy of the first column twice": in_columns("bin == 0 || 2 * bin == a", "2 * bin == a"),
    "energies of another part": in_columns("blockIdx.y * gridDim.x + blockIdx.x", "blockIdx.x"),
    "energies of another warp": in_columns("+ threadIdx.x / kWarpSize;", "+ 0;"),
    "energy of every other row": in_columns("blockDim.x) >> job.columns_log2) {\n    const float2 value",
                                            "2 * blockDim.x) >> job.columns_log2) {\n    const float2 value"),
    "energy of coarse columns without their mirrors": in_columns("(alone ? 0.25 : 0.5)", "0.25", "coarse",
                                                                 "coarse_filter.cpp"),
    "energy of coarse columns beside the background": in_columns("(gain + plan.background)", "(gain - plan.background)",
                                                                 "coarse", "coarse_filter.cpp"),
    "energy of the coarse grid without the mean": in_columns("+ taken;", ";", "coarse"),
    "energy of another coarse row": in_columns("(row * bins + bin)", "(bin)", "coarse"),
    "energy after the gain": in_columns("tells) energy +=", "tells) value.x *= gain, value.y *= gain, energy +=",
                                        "coarse"),
    "no barrier before the lines": in_rows(f"  __syncthreads();\n{LINES}", LINES),
    "the coarse row of another cell": Bug("interpolate.cu", "coarse[0] = coarse_row(cell)",
                                          "coarse[0] = coarse_row(cell + 1)", "interpolate.cu"),
    "two columns of one cell": Bug("interpolate.cu", "load(window.cell + column + c) - first_", "0",
                                   "interpolate.cu"),
    "coarse columns that do not wrap": Bug("interpolate.cu", "(wrap_ahead(first_ + j, column_count_) - first_)", "j",
                                           "interpolate.cu"),
    "every other weight of a window": Bug("interpolate.cu", "entries[c] = two.y", "entries[c] = 0",
                                          "interpolate.cu"),
    "the base before the factor": Bug("add_last.cuh", "__fmul_rn(add.factor, sum)", "sum", "interpolate.cu",
                                      width=300),
    "the base of another row": Bug("interpolate.cu", "base[i].entries[c], ", "base[0].entries[c], ", "interpolate.cu",
                                 width=300),
    "energy of a bin without its mirror": Bug("coarse_mask.cu", "(alone ? 1.0 : 2.0)", "1.0", "coarse_mask.cu"),
    "energy of the first bins twice": Bug("coarse_mask.cu", "(alone ? 1.0 : 2.0)", "2.0", "coarse_mask.cu"),
    "energy of the correction alone": Bug("coarse_mask.cu", "(gain + a.background)", "(gain - a.background)",
                                          "coarse_mask.cu"),
    "energy without the mean": Bug("coarse_mask.cu", "* size * window;", "* 0.0;", "coarse_mask.cu"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_sum_and_filter_is_caught(name: str, tmp_path: Path) -> None:
    shape, response, count = (BUGS[name].height, BUGS[name].width), fm.HighPass(0.1), 3
    (base, models), weights = inputs(shape, count, mean=2.0), weights_of(count)
    plan = plan_of(BUGS[name].form, shape, response)
    want = torch.empty(shape)
    numbers = emulated.backend().weighted_sum(base, models, weights, want)
    numbers.append(emulated.backend().square_sum(want))
    emulated.backend().executable(plan).run([want], 1.0)
    squares = emulated.backend().square_sum(want)
    want_merged = add_round(base, want, 0.7, base.dtype, factor=1.1)

    def is_right(backend: CudaBackend) -> bool:
        module, right = backend._runtime.module, True
        for order in ORDERS:
            module.set_order(getattr(module.Order, order))
            found = backend.filtered_sum(plan, base, models, weights, torch.empty(shape))
            assert found is not None
            means, before, after, late = found
            if not isinstance(late, LateSum):
                return False
            merged = torch.zeros(shape[0] + 2, shape[1], dtype=base.dtype)  # room for what a bug writes beyond the end
            assert late.add_round(merged[:-2], base, 0.7, 1.1) is (shape[1] % 4 == 0)
            right = right and (shape[1] % 4 != 0 or torch.equal(merged[:-2], want_merged)) and not merged[-2:].any()
            right = right and after == pytest.approx(squares, rel=1e-6)
            right = right and torch.equal(late.tensor, want) and [*means, before] == pytest.approx(numbers, rel=1e-12)
        module.set_order(module.Order.forward)
        return right

    assert is_right(emulated.backend())
    assert not is_right(emulated.backend_with(BUGS[name], tmp_path))


def plan_of(form: str, shape: tuple[int, int], response: Response) -> Plan:
    """The full form is in three kernels, "coarse" the decimated one whose grids go through them."""
    if form != "full":
        return decimated_plan(shape, response, own=form == "coarse")
    parts = 4 if shape[0] % 4 == 0 else 1
    tiles = Tiles(parts, 8, 64, 64, convolution(shape[1]), convolution(shape[0] // parts))
    plan = three_kernels(shape, response, tiles)
    assert plan is not None
    return plan
