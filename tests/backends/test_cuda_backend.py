"""The CUDA backend, from the Python API down to its kernels, run by the emulation on CPU tensors."""

from __future__ import annotations

import gc
import itertools
import math
import random
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import emulated
import freemerge as fm
import freemerge.experts as fx
from benchmarks.traffic import traffic
from freemerge.accumulate import abs_means, add_round, task_vector_sum
from freemerge.backends import registry
from freemerge.backends.cuda import CudaBackend
from freemerge.backends.cuda_runtime import Capability, Runtime, Stream, covers
from freemerge.backends.sparse import Update, native_updates
from freemerge.backends.torch import TorchBackend
from freemerge.cache import forget_all
from freemerge.checkpoint import TensorSpec
from freemerge.errors import ArgumentError, BackendError, CudaError
from freemerge.experts.select import select_largest
from freemerge.merging.units import plan_units
from freemerge.planner.forms import candidates
from freemerge.planner.plan import Plan
from freemerge.responses import MaskParams, Response
from in_memory import noise
from oracle import oracle_filter
from reference import reference_filter, reference_merge
from updates import apply_, expected, mixed_updates, sparse

HIGH_PASS = fm.HighPass(0.05)
THREE_KERNELS = "full in three kernels"
FORMS = ("decimated", "full", THREE_KERNELS)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def device() -> Iterator[CudaBackend]:
    """CPU tensors are device tensors here; torch takes the rest, and computes what is expected."""
    with registry.using(emulated.backend(), TorchBackend()):
        yield emulated.backend()
    emulated.module().set_order(emulated.module().Order.forward)


def promised(plan: Plan) -> int:
    """Bytes of workspace that the backend announces."""
    traits = emulated.backend().traits(torch.device(plan.device))
    assert traits is not None
    assert traits.workspace is not None
    return traits.workspace(plan)


def plans(x: torch.Tensor, response: Response) -> list[Plan]:
    """Every plan the backend has for a matrix, not only the best."""
    backend = emulated.backend()
    traits = backend.traits(x.device)
    assert traits is not None
    found = candidates(response, tuple(x.shape[-2:]), x.dtype, str(x.device), "cuda", traits)
    return [plan for plan in found if backend.supports(plan) is None]


def plan_of_form(x: torch.Tensor, response: Response, form: str) -> Plan:
    return next(plan for plan in plans(x, response) if form == (THREE_KERNELS if plan.tiles else plan.form))


def relative_error(got: torch.Tensor, want: torch.Tensor, x: torch.Tensor) -> float:
    """Relative to the result, unless that is tiny beside the input."""
    norm = max(float(want.norm()), 0.3 * float(x.double().norm()))
    return float((got.double() - want).norm()) / norm


SMOOTH = [
    *(fm.Butterworth(cutoff, order) for order in (1, 2, 3.5, 8, 20) for cutoff in (0.05, 0.4)),
    *(fm.Gaussian(cutoff) for cutoff in (0.004, 0.02, 0.3, 3.0, 300.0)),
]


@pytest.mark.parametrize("response", SMOOTH, ids=repr)
def test_smooth_masks_agree_with_the_oracle(response: Response) -> None:
    for shape in [(96, 130), (49, 54)]:
        x = noise(*shape)
        want = torch.from_numpy(oracle_filter(x.double().numpy(), response.mask(shape)))
        loudest = float(response.mask(shape).max())
        for plan in plans(x, response):
            y = x.clone()
            emulated.backend().executable(plan).run([y[None]], 1.0)
            assert float((y - want).norm()) < 5e-7 * loudest * float(x.double().norm()), f"{plan}"


@pytest.mark.parametrize("edge", [0.0, 1e-200, 1e-9, 0.3, 77.0, 1e9, 1e200])
def test_smooth_gains_in_float_keep_their_relative_accuracy(edge: float) -> None:
    with np.errstate(all="ignore"):
        near = (edge * np.geomspace(1e-3, 1e3, 501)) ** 2
        squares = np.unique(np.concatenate([[0.0, 5e-324, edge * edge], near, np.geomspace(1e-300, 1e300, 601)]))
        squares = squares[np.isfinite(squares)]
        if not 0 < edge * edge < np.inf:  # scaled by powers of two, for radii as matrices have them
            squares = squares[(squares == 0) | (squares > 1e-20) & (squares < 1e20)]
        s = np.where(squares == 0.0, 0.0, squares / np.longdouble(edge) ** 2)
        wanted = {MaskParams("gaussian", 8, 8, edge0=edge): -np.expm1(-s / 2)}
        for order in (0.5, 0.7, 1.0, 2.0, 3.5, 5.9, 8.0, 20.0, 99.9, 1e5):
            wanted[MaskParams("butterworth", 8, 8, edge0=edge, order=order)] = 1 / (1 + s**-order)
        allowed = 3e-7 + 3e-8 * np.abs(np.log(s))  # the fraction of an order is rounded, too
    in_range = (s > 1e-37) & (s < 1e37)  # of float; elsewhere gains are all but 0 or 1
    for mask, want in wanted.items():
        wrong = np.abs(np.array(emulated.module().smooth_gains(mask, squares.tolist())) - want)
        assert wrong[~in_range].max() < 1e-12, f"{mask}"
        assert (wrong[in_range] <= allowed[in_range] * want[in_range] + 1e-37).all(), f"{mask}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_the_rounded_float32_result(dtype: torch.dtype) -> None:
    x = noise(128, 200, dtype=dtype)
    for form in FORMS:
        got, wide = x.clone(), x.float()
        emulated.backend().executable(plan_of_form(x, HIGH_PASS, form)).run([got[None]], 1.0)
        emulated.backend().executable(plan_of_form(wide, HIGH_PASS, form)).run([wide[None]], 1.0)
        assert torch.equal(got, wide.to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_threads_and_repetition_change_no_bit(form: str) -> None:
    x, module = noise(96, 130), emulated.module()
    results = []
    for order in ("forward", "reverse", "random", "random"):
        module.set_order(getattr(module.Order, order))
        y = x.clone()
        emulated.backend().executable(plan_of_form(x, HIGH_PASS, form)).run([y[None]], 1.0)
        results.append(y)
    assert all(torch.equal(results[0], y) for y in results)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_its_matrices_one_by_one(form: str) -> None:
    batch = noise(70, 24, 40)  # more than one launch takes
    plan = plan_of_form(batch, fm.HighPass(0.1), form)
    together, alone = batch.clone(), batch.clone()
    emulated.backend().executable(plan).run([together], 1.0)
    for x in alone:
        emulated.backend().executable(plan).run([x[None]], 1.0)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("form", FORMS)
def test_rows_more_than_two_to_the_31_entries_apart(form: str) -> None:
    rows, width = 24, 30
    stride = (1 << 31) // 8 + 1  # the last rows begin beyond 2^31 entries
    try:
        storage = torch.empty((rows - 1) * stride + width, dtype=torch.bfloat16)  # touched in a few pages only
    except RuntimeError as error:
        pytest.skip(f"cannot reserve {2 * rows * stride / 2**30:.0f} GiB of address space: {error}")
    x = storage.as_strided((rows, width), (stride, 1))
    dense = noise(rows, width, dtype=torch.bfloat16)
    x.copy_(dense)
    response = fm.HighPass(0.1)
    plan = plan_of_form(dense, response, form)
    emulated.backend().executable(plan).run([x[None]], 1.0)
    emulated.backend().executable(plan).run([dense[None]], 1.0)
    assert torch.equal(x, dense)


def test_panels_of_chunks_are_filtered_one_after_the_other() -> None:
    height, width, chunk_rows, taps = 3000, 2048, 8, 10
    x, response = noise(height, width), fm.HighPass(0.1)
    plan = plan_of_form(x, response, "decimated")
    assert plan.rows is not None
    assert plan.rows.taps == taps
    assert height // chunk_rows * (taps + 1) * width * 4 > 32 << 20  # partial coarse rows, more than a panel holds
    executable = emulated.backend().prepare(plan)
    executable.native.chunk_rows = chunk_rows  # type: ignore[attr-defined]
    y = x.clone()
    executable.run([y[None]], 1.0)
    assert relative_error(y, reference_filter(x, response), x) < 5e-7


@pytest.mark.parametrize("taps", [8, 10, 12])
@pytest.mark.parametrize("cells", [36, 60, 100, 101, 150, 200, 299])
def test_columns_of_a_thread_touch_few_coarse_columns_or_many(cells: int, taps: int) -> None:
    x = noise(70, 300)
    plan = plan_of_form(x, HIGH_PASS, "decimated")
    assert plan.columns is not None
    plan = replace(plan, columns=replace(plan.columns, cells=cells, taps=taps))
    y = x.clone()
    emulated.backend().executable(plan).run([y[None]], 1.0)
    assert relative_error(y, reference_filter(x, HIGH_PASS), x) < 1e-6


def test_a_dominant_mean_keeps_its_accuracy() -> None:
    x = noise(128, 200) + 1000.0
    want = reference_filter(x, HIGH_PASS)
    y = x.clone()
    emulated.backend().executable(plan_of_form(x, HIGH_PASS, "decimated")).run([y[None]], 1.0)
    assert float((y - want).norm() / want.norm()) < 1e-4  # float32 alone holds 1000 to 3e-5


@pytest.mark.parametrize("form", FORMS)
def test_memory_stays_within_what_explain_promised(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    empty = torch.empty

    def record(*size: int, **options: object) -> torch.Tensor:
        taken.append(math.prod(size))
        return empty(*size, **options)  # type: ignore[call-overload, no-any-return]

    for shape, count in itertools.product([(96, 130), (300, 90)], [1, 3, 70]):
        batch = noise(count, *shape)
        plan = plan_of_form(batch, HIGH_PASS, form)
        announced = promised(plan)
        emulated.backend().executable(plan).run([batch], 1.0)  # makes the tables
        taken.clear()
        monkeypatch.setattr(torch, "empty", record)
        emulated.backend().executable(plan).run([batch], 1.0)
        monkeypatch.setattr(torch, "empty", empty)
        assert len(taken) == 1
        assert taken[0] <= announced


@pytest.mark.parametrize("shape", [(96, 130), (60, 25600), (400, 3001), (1, 65537), (2048, 2048)], ids=str)
def test_no_number_of_matrices_needs_more_than_promised(shape: tuple[int, int]) -> None:
    x = torch.empty(shape)
    for response in (HIGH_PASS, fm.Butterworth(0.3)):
        for plan in plans(x, response):
            executable, stream = emulated.backend().executable(plan), emulated.runtime().stream(x.device)
            entry = 4 * math.prod(shape)
            needed = [
                executable.workspace([], [4096 + i * step for i in range(count)], [shape[1]] * count, stream)
                for count in (*range(1, 20), 63, 64, 65, 127, 200)
                for step in (entry, 2 * entry, entry + 4)  # one run, runs of their own, misaligned for cuFFT
            ]
            assert max(needed) <= promised(plan), f"{needed}\n{plan}"


def test_explain_promises_the_general_form_a_spectrum_and_panels() -> None:
    panels = (16 + 16) << 20  # batches of small spectra, cuFFT's work area
    for shape in [(96, 130), (2048, 2048)]:
        plan = fm.explain(shape, fm.Butterworth(0.3), backend="cuda")
        assert plan.form == "full"
        matrix_bytes = 4 * shape[0] * shape[1]
        assert plan.workspace_bytes <= matrix_bytes + 8 * 4 * shape[0] + panels
    small = fm.explain((4096, 4096), HIGH_PASS, backend="cuda")
    assert small.form == "decimated"
    assert small.workspace_bytes < 0.35 * 4 * 4096 * 4096


def test_the_plan_cache_is_bounded() -> None:
    module = emulated.module()
    module.clear_fft_cache()
    for height in range(20, 280):
        fm.filter_(noise(height, 30), fm.Butterworth(0.3), backend="cuda")
    assert module.fft_cache_size() == 256
    module.clear_fft_cache()
    assert module.fft_cache_size() == 0


def test_a_graph_needs_a_call_before_and_keeps_its_plans() -> None:
    module, x = emulated.module(), noise(50, 34)
    plan = plan_of_form(x, fm.Butterworth(0.3), "full")
    module.clear_fft_cache()
    promised(plan)  # tables are there, cuFFT's plans too
    module.clear_fft_cache()
    module.set_capturing(True)
    try:
        with pytest.raises(CudaError, match="run the same call once before the capture"):
            emulated.backend().executable(plan).run([x[None]], 1.0)
        module.set_capturing(False)
        emulated.backend().executable(plan).run([x.clone()[None]], 1.0)
        module.set_capturing(True)
        emulated.backend().executable(plan).run([x[None]], 1.0)
    finally:
        module.set_capturing(False)
    kept = module.fft_cache_size()
    for height in range(60, 260):
        other = plan_of_form(noise(height, 30), fm.Butterworth(0.3), "full")
        emulated.backend().executable(other).run([noise(height, 30)[None]], 1.0)
    assert module.fft_cache_size() == 256
    module.set_capturing(True)
    try:
        emulated.backend().executable(plan).run([x[None]], 1.0)  # its plans outlived hundreds of others
    finally:
        module.set_capturing(False)
    assert kept >= 2


def test_what_a_graph_refers_to_stays_and_nothing_is_uploaded_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(50, 34)
    for capturing in (False, True):
        executable = weakref.ref(emulated.backend().executable(plan_of_form(x, HIGH_PASS, "full")))
        with monkeypatch.context() as patch:
            patch.setattr(emulated.runtime(), "stream", lambda _, capturing=capturing: Stream(0, 0, capturing))
            executable().run([x[None]], 1.0)
        forget_all()
        gc.collect()
        assert (executable() is not None) == capturing
    with monkeypatch.context() as patch:
        patch.setattr(emulated.runtime(), "stream", lambda _: Stream(0, 0, True))
        with pytest.raises(BackendError, match="run the same call before"):
            emulated.backend().executable(plan_of_form(x, HIGH_PASS, "full"))


def test_an_empty_name_of_cufft_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = emulated.fresh_module(tmp_path)
    monkeypatch.setenv("FREEMERGE_CUFFT", "")
    path, _ = fresh.open_cufft([str(emulated.build() / "libcufft.so.12")])
    assert path.endswith("libcufft.so.12")


def test_errors_carry_operation_and_place() -> None:
    module = emulated.module()
    module.set_device_count_error(35)  # cudaErrorInsufficientDriver
    try:
        with pytest.raises(CudaError, match="cudaGetDeviceCount failed: cudaErrorInsufficientDriver") as caught:
            module.device_count()
        without_driver = CudaBackend(Runtime(module, "cpu"))
        assert not without_driver.info().available
    finally:
        module.set_device_count_error(0)
    assert caught.value.operation == "cudaGetDeviceCount"
    assert caught.value.code == 35
    assert caught.value.file == "cuda_device.cpp"
    assert caught.value.line > 0
    assert without_driver.info().reason.startswith("no usable GPU or driver")
    with pytest.raises(BackendError, match="no usable GPU or driver"):
        without_driver.prepare(plan_of_form(noise(9, 9), HIGH_PASS, "full"))


def test_what_it_cannot_do_it_refuses() -> None:
    x = noise(64, 64)
    plan = plan_of_form(x, HIGH_PASS, "full")
    assert emulated.backend().supports(replace(plan, form="thin")) is not None
    assert emulated.backend().supports(replace(plan, dtype=torch.float64)) is not None
    with pytest.raises(BackendError, match="has no kernels for"):
        fm.filter_(x.double(), HIGH_PASS, backend="cuda")


def test_bytes_of_tiles_need_tiles() -> None:
    with pytest.raises(ValueError, match="tiles must have parts"):
        emulated.module().tile_bytes(8, 8, None)


# --- switching experts ------------------------------------------------------------------------------------------------


def test_many_tensors_share_a_launch_but_not_with_others_of_their_memory() -> None:
    module, weights = emulated.module(), noise(90, 80)
    jobs, _ = native_updates([update for update in mixed_updates([*TOLERANCE], 130) if update.entries.indices.numel()])
    assert 60 < len(jobs) <= 120
    assert module.SparseSwitch(jobs).launches == 2
    assert module.SparseSwitch(jobs[:60]).launches == 1
    overlapping = [
        Update(weights, sparse(7200, 5000, 5), 0.5),
        Update(noise(50), sparse(50, 20, 7), 1.0),
        Update(weights[1:], sparse(7120, 5000, 6, torch.int64), -2.0),
    ]
    assert module.SparseSwitch(native_updates(overlapping)[0]).launches == 2


def test_the_order_of_blocks_and_threads_changes_no_update() -> None:
    updates = mixed_updates([*TOLERANCE], 130)
    before, after = [update.weights.clone() for update in updates], [expected(update) for update in updates]
    emulated.module().set_order(emulated.module().Order.random)
    with apply_(updates, backend="cuda"):
        assert all(torch.equal(update.weights, want) for update, want in zip(updates, after, strict=True))
    assert all(torch.equal(update.weights, want) for update, want in zip(updates, before, strict=True))


def test_a_bank_switches_on_the_device_and_leaves_every_weight_bit_identical() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 8).bfloat16())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tasks = {
        f"task{i}": {name: value + noise(*value.shape, dtype=value.dtype, seed=i) for name, value in before.items()}
        for i in range(8)
    }
    experts = fx.extract_experts(before, tasks, density=0.1)
    bank, picks = fx.ExpertBank(model, experts, base=before), random.Random(0)
    for _ in range(1000):
        with bank.active(picks.choice([*tasks]), combine=picks.choice(["add", "replace"])):
            assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- merging ----------------------------------------------------------------------------------------------------------


def models_of(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    shapes = {"a.weight": (48, 64), "b.weight": (70, 30), "norm.weight": (24,)}
    base = {name: noise(*shape, dtype=dtype) for name, shape in shapes.items()}
    models = [
        {name: (x.double() + 0.1 * noise(*x.shape, seed=seed)).to(dtype) for name, x in base.items()}
        for seed in (1, 2, 3)
    ]
    return base, models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_does_all_its_arithmetic_on_the_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = emulated.module(), Counter[str]()
    for name in ("accumulate", "add_round"):
        kernel = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *values, name=name, kernel=kernel: calls.update([name]) or kernel(*values)
        )
    base, models = models_of(dtype)
    recipe = fm.Recipe(response=HIGH_PASS, renormalize=None)
    merged = fm.merge(base, models, recipe, backend="cuda")
    specs = {name: TensorSpec(name, tuple(x.shape), x.dtype) for name, x in base.items()}
    want = reference_merge(base, models, recipe, plan_units(specs, recipe.select, recipe.views))
    for name, x in merged.items():
        assert x.dtype == dtype
        assert relative_error(x, want[name], base[name]) < TOLERANCE[dtype]
    assert calls["accumulate"] >= len(base)
    assert calls["add_round"] == len(base)


def test_operations_without_a_gpu_say_why() -> None:
    module, why = emulated.module(), "no usable GPU or driver: cudaGetDeviceCount failed: cudaErrorNoDevice"
    base, models = models_of(torch.float32)
    x = base["a.weight"]
    module.set_device_count_error(100)  # cudaErrorNoDevice
    try:
        with registry.using(CudaBackend(Runtime(module, "cpu")), TorchBackend()):
            for operation in (
                lambda: fm.merge(base, models, backend="cuda"),
                lambda: fm.filtered(x, HIGH_PASS, backend="cuda"),
                lambda: abs_means(x, [x], backend="cuda"),
                lambda: add_round(x, x, 1.0, x.dtype, backend="cuda"),
                lambda: select_largest(x, x, 1, backend="cuda"),
                lambda: apply_([Update(x, sparse(x.numel(), 3, 0), 1.0)], backend="cuda"),
            ):
                with pytest.raises(BackendError, match=f"backend cuda is not available: {why}"):
                    operation()
            assert abs_means(x, [x]) == [0.0]  # "auto" goes on to the next
    finally:
        module.set_device_count_error(0)


@pytest.mark.parametrize(
    ("architectures", "covered", "not_covered"),
    [
        ("80-real 90-real 90-virtual", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5), (7, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0), (7, 5)]),
        ("75-virtual", [(7, 5), (8, 0), (12, 0)], [(7, 0), (6, 1)]),
        ("80", [(8, 0), (8, 9), (9, 0)], [(7, 5)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("native", [(7, 5), (12, 0)], []),
        ("", [], [(9, 0)]),
    ],
)
def test_code_runs_on_its_major_version_and_ptx_on_all_later_ones(
    architectures: str, covered: list[Capability], not_covered: list[Capability]
) -> None:
    assert all(covers(architectures, capability) for capability in covered)
    assert not any(covers(architectures, capability) for capability in not_covered)


def test_a_gpu_that_it_was_not_built_for_is_left_to_torch_with_the_reason() -> None:
    class Old(Runtime):
        def capability(self, device: torch.device) -> Capability:
            return 7, 5

    x, why = noise(64, 48), r"it has no code for a GPU of compute capability 7\.5, only for 80-real 90; reinstall"
    with registry.using(CudaBackend(Old(emulated.module(), "cpu")), TorchBackend()):
        for operation in (lambda: fm.filtered(x, HIGH_PASS, backend="cuda"), lambda: abs_means(x, [x], backend="cuda")):
            with pytest.raises(BackendError, match=f"backend cuda is not available: {why}"):
                operation()
        assert "it has no code for a GPU" in fm.explain(x, HIGH_PASS).reason
        assert torch.equal(fm.filtered(x, HIGH_PASS), fm.filtered(x, HIGH_PASS, backend="torch"))
        assert abs_means(x, [x]) == [0.0]


def test_one_of_two_gpus_that_it_was_not_built_for_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, backend = noise(64, 48), CudaBackend(emulated.runtime())
    with registry.using(backend, TorchBackend()):
        assert backend.info().available
        monkeypatch.setattr(emulated.runtime(), "covers", lambda device: False)  # the machine's other one is covered
        assert fm.explain(x, HIGH_PASS).backend == "torch"
        assert "backend cuda has no code for the GPU cpu" in fm.explain(x, HIGH_PASS).reason
        with pytest.raises(BackendError, match="backend cuda has no code for the GPU cpu"):
            fm.filtered(x, HIGH_PASS, backend="cuda")
        assert registry.pick("auto", (x,)).name == "torch"
        with pytest.raises(ArgumentError, match="has no code for the GPU cpu"):
            registry.pick("cuda", (x,))


def test_float64_is_refused_with_the_reason_and_left_to_torch() -> None:
    with pytest.raises(BackendError, match=r"backend cuda has no kernels for torch\.float64"):
        fm.merge(*models_of(torch.float64), backend="cuda")
    plan = fm.explain((64, 48), HIGH_PASS, dtype=torch.float64)
    assert plan.backend == "torch"
    assert "backend cuda has no kernels for torch.float64" in plan.reason


def test_a_cpu_tensor_starts_no_driver() -> None:
    class Untouchable(ModuleType):
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"{name} was asked for")

    with registry.using(CudaBackend(Runtime(Untouchable("_cuda"), "cuda")), TorchBackend()):
        assert "backend cuda does not run on device cpu" in fm.explain((64, 48), HIGH_PASS).reason
        assert abs_means(noise(4), [noise(4)]) == [0.0]


def test_forcing_the_backend_on_what_it_does_not_take() -> None:
    with pytest.raises(ArgumentError, match="float32, bfloat16 or float16"):
        task_vector_sum(noise(4).double(), [noise(4)], [1.0], backend="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_reads_every_model_once_and_writes_once(dtype: torch.dtype) -> None:
    n, module = 5001, emulated.module()
    base, models, out = noise(n, dtype=dtype), [noise(n, dtype=dtype, seed=i) for i in (1, 2, 3)], torch.empty(n)
    for tensor in (base, *models, out):
        module.watch(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    task_vector_sum(base, models, [0.2, 0.3, 0.5], out=out, backend="cuda")
    stored = n * dtype.itemsize
    assert module.watched() == [(stored, 0)] * 4 + [(0, 4 * n)]
    loads, stores = accesses_of(n, dtype), accesses_of(n, torch.float32)
    assert module.accesses() == [(loads, 0)] * 4 + [(0, stores)]
    module.unwatch_all()
    module.watch(base.data_ptr(), stored)
    module.watch(out.data_ptr(), 4 * n)
    add_round(base, out, 0.7, dtype, out=base, backend="cuda")
    assert module.watched() == [(stored, stored), (4 * n, 0)]
    assert module.accesses() == [(loads, loads), (stores, 0)]
    module.unwatch_all()


def accesses_of(n: int, dtype: torch.dtype) -> int:
    """Of 16 bytes, while eight entries are left, then of one entry."""
    return n // 8 * 8 * dtype.itemsize // 16 + n % 8


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sums_and_additions_at_any_alignment(dtype: torch.dtype) -> None:
    """Bit for bit those of torch at every address; the means do not depend on it either."""
    n, models = 2100, 18  # more than one block, and more models than one launch takes
    values = [noise(n, dtype=dtype, seed=seed) for seed in range(models + 1)]
    weights = [0.1 * i for i in range(models)]
    want, want_means = task_vector_sum(values[0], values[1:], weights, backend="torch")
    aligned_means: list[float] = []
    for shift in (0, 1, 3):
        base, *shifted = (torch.cat([x[:shift], x])[shift:] for x in values)
        if shift == 3:
            shifted[0] = values[1]  # one of them aligned
        out = torch.empty(n + shift)[shift:]
        _, means = task_vector_sum(base, shifted, weights, out=out, backend="cuda")
        assert torch.equal(out, want)
        assert means == pytest.approx(want_means, rel=1e-12)
        aligned_means = aligned_means or means
        assert means == aligned_means
        rounded = torch.empty(n + shift, dtype=dtype)[shift:]
        add_round(base, out, 0.7, dtype, out=rounded, backend="cuda")
        assert torch.equal(rounded, add_round(values[0], want, 0.7, dtype, backend="torch"))


# --- traffic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["decimated", "full"])
def test_the_traffic_model_counts_what_the_kernels_load_and_store(form: str, dtype: torch.dtype) -> None:
    module, x = emulated.module(), noise(256, 320, dtype=dtype)
    plan = plan_of_form(x, HIGH_PASS, form)
    model = traffic(plan)
    emulated.backend().executable(plan).run([x[None]], 1.0)
    module.watch(x.data_ptr(), x.numel() * x.element_size())
    emulated.backend().executable(plan).run([x[None]], 1.0)
    ((loaded, stored),) = module.watched()
    module.unwatch_all()
    steps = [step for step in model.steps if step.where == "matrix"]
    assert stored == sum(step.written for step in steps if "cuFFT" not in step.name)
    read = sum(step.read for step in steps)
    read -= sum(step.read for step in steps if "cuFFT" in step.name)  # of a float matrix, counted apart
    # A sample of the matrix gives its mean, and the last row of a cell is asked for again while it is in L1.
    assert read <= loaded <= (1.5 * read if form == "decimated" else read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("height", [96, 97])  # columns of the fused kernel, and of cuFFT
def test_the_traffic_model_counts_panels_and_spectra_exactly(height: int, dtype: torch.dtype) -> None:
    module, x = emulated.module(), noise(height, 130, dtype=dtype)
    plan = plan_of_form(x, HIGH_PASS, "full")
    emulated.backend().executable(plan).run([x[None]], 1.0)
    emulated.standin_traffic()
    module.watch(0, (1 << 63) - 1)
    emulated.backend().executable(plan).run([x[None]], 1.0)
    ((loaded, stored),) = module.watched()
    module.unwatch_all()
    fft_read, fft_written = emulated.standin_traffic()
    steps = traffic(plan).steps
    assert fft_read == sum(step.read for step in steps if "cuFFT" in step.name)
    assert fft_written == sum(step.written for step in steps if "cuFFT" in step.name)
    assert loaded >= sum(step.read for step in steps if "cuFFT" not in step.name)  # and tables, from L1
    assert stored == sum(step.written for step in steps if "cuFFT" not in step.name)


def test_coarse_rows_are_a_panel_on_the_way_there_only() -> None:
    height, width, chunk_rows = 256, 320, 32
    module, x = emulated.module(), noise(height, width)
    plan = plan_of_form(x, HIGH_PASS, "decimated")
    assert plan.rows is not None
    assert plan.columns is not None
    emulated.backend().executable(plan).run([x[None]], 1.0)
    module.watch(0, (1 << 63) - 1)
    emulated.backend().executable(plan).run([x[None]], 1.0)
    ((_, stored),) = module.watched()
    module.unwatch_all()
    cleared, mean = 4 * plan.rows.cells * plan.columns.cells, 4
    model = sum(step.written for step in traffic(plan).steps if "cuFFT" not in step.name) - cleared + mean
    shared = 4 * plan.rows.taps * width * (height // chunk_rows)  # coarse rows of two chunks, at most
    assert model < stored <= model + shared
