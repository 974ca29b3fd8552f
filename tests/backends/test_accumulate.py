"""Weighted task-vector sums on every backend: against float64, and the same bytes as torch's."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from normals import DTYPES, normal

import freemerge as fm
from freemerge import accumulate
from freemerge.backends import memory, registry, result_memory
from freemerge.backends.cpu import CpuBackend
from freemerge.errors import ArgumentError


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[torch.Tensor], list[float]]:
    shape = tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)))
    count = draw(st.sampled_from([1, 2, 3, 4, 20]))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=count + 1, max_size=count + 1))
    seed = draw(st.integers(0, 1000))
    tensors = [normal(shape, seed + i, dtype) for i, dtype in enumerate(dtypes)]
    if draw(st.booleans()):
        tensors = [tensor.transpose(0, -1) for tensor in tensors]
    weights = draw(st.lists(st.floats(-2, 2, width=32), min_size=count, max_size=count))
    return tensors[0], tensors[1:], weights


def refusal(backend: str, *tensors: torch.Tensor) -> str | None:
    """Why a backend does not take them: the CUDA backend has no float64."""
    kind = registry.named(backend)
    assert kind is not None
    return kind.takes(tensors)


def assume_taken(backend: str, *tensors: torch.Tensor) -> None:
    assume(refusal(backend, *tensors) is None)


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_sum_and_means_agree_with_float64(
    backend: str, case: tuple[torch.Tensor, list[torch.Tensor], list[float]]
) -> None:
    base, models, weights = case
    assume_taken(backend, base, *models)
    out, means = accumulate.task_vector_sum(base, models, weights, backend=backend)
    vectors = [model.double() - base.double() for model in models]
    exact = sum((w * v for w, v in zip(weights, vectors, strict=True)), torch.zeros_like(base.double()))
    wide = any(tensor.dtype == torch.float64 for tensor in (base, *models))
    assert out.dtype == (torch.float64 if wide else torch.float32)
    assert out.shape == base.shape
    assert out.is_contiguous()
    epsilon = torch.finfo(out.dtype).eps
    bound = sum((abs(w) * v.abs() for w, v in zip(weights, vectors, strict=True)), torch.zeros_like(exact))
    assert ((out.double() - exact).abs() <= (len(models) + 2) * (epsilon * bound + torch.finfo(out.dtype).tiny)).all()
    for mean, vector in zip(means, vectors, strict=True):
        expected = float(vector.abs().mean()) if vector.numel() else 0.0
        assert mean == pytest.approx(expected, rel=2 * epsilon + 1e-12, abs=0)
    assert means == accumulate.abs_means(base, models, backend=backend)
    reused = torch.full_like(out, math.nan)
    assert accumulate.task_vector_sum(base, models, weights, out=reused, backend=backend)[0] is reused
    assert torch.equal(reused, out)


@pytest.mark.parametrize("backend", ["cpu", "cuda-emulated"], indirect=True)
@settings(deadline=None, max_examples=40)
@given(case=cases(), out_dtype=st.sampled_from(DTYPES), scale=st.floats(-3, 3))
def test_native_and_torch_write_the_same_bytes(
    backend: str, case: tuple[torch.Tensor, list[torch.Tensor], list[float]], out_dtype: torch.dtype, scale: float
) -> None:
    base, models, weights = case
    assume_taken(backend, base, *models, torch.empty(0, dtype=out_dtype))
    native, torch_ = (accumulate.task_vector_sum(base, models, weights, backend=name) for name in (backend, "torch"))
    assert torch.equal(native[0], torch_[0])
    assert torch.equal(native[0].signbit(), torch_[0].signbit())  # of zeros, too
    assert native[1] == pytest.approx(torch_[1], rel=1e-12)
    for delta in (native[0], models[0]):
        merged = [accumulate.add_round(base, delta, scale, out_dtype, backend=name) for name in (backend, "torch")]
        assert torch.equal(*merged)


@pytest.mark.parametrize(("base_dtype", "model_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_many_blocks_do_not_depend_on_the_thread_count(base_dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    base, models = normal((70001,), 1, base_dtype), [normal((70001,), 2 + i, model_dtype) for i in range(3)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(accumulate.task_vector_sum(base, models, [0.25, -1.0, 3.0], backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for out, means in results[1:]:
        assert torch.equal(out, results[0][0])
        assert means == results[0][1]
    for model, mean in zip(models, results[0][1], strict=True):
        assert mean == pytest.approx(float((model.double() - base.double()).abs().mean()), rel=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_is_multiplied_before_the_scale(backend: str, dtype: torch.dtype) -> None:
    base = normal((40003,), 1, dtype)
    delta = normal((40003,), 2, memory.arithmetic_of([base]))
    if (why := refusal(backend, base)) is not None:
        pytest.skip(f"backend {backend} {why}")
    want = accumulate.add_round(base, delta.clone().mul_(1 / 3), 0.7, dtype, backend=backend)
    assert torch.equal(accumulate.add_round(base, delta, 0.7, dtype, factor=1 / 3, backend=backend), want)
    assert not torch.equal(accumulate.add_round(base, delta, 0.7, dtype, backend=backend), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_round_rounds_the_float32_sum_to_nearest_even(dtype: torch.dtype) -> None:
    base, delta = normal((40000,), 1, torch.bfloat16), normal((40000,), 2)
    expected = (base.float() + torch.tensor(0.7) * delta).to(dtype)
    assert torch.equal(accumulate.add_round(base, delta, 0.7, dtype), expected)


def test_every_16_bit_pattern_converts_and_rounds_as_torch_does() -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = bits.view(dtype)
        widened = accumulate.add_round(values, torch.zeros(values.numel()), 1.0, torch.float32, backend="cpu")
        torch.testing.assert_close(widened, values.float(), rtol=0, atol=0, equal_nan=True)
        between = values.float() * torch.tensor(1.0 + 2.0**-9)  # neither grid: halves, quarters and ties of both
        for scaled in (between, values.float() * (1 + 2.0**-11), values.float() * (1 + 2.0**-8)):
            zero = torch.zeros(values.numel(), dtype=dtype)
            rounded = accumulate.add_round(zero, scaled, 1.0, dtype, backend="cpu")
            torch.testing.assert_close(rounded, scaled.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [1, 15, 63, 64, 65, 1000])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_round_from_any_arithmetic_to_any_dtype(n: int, wide: torch.dtype, dtype: torch.dtype) -> None:
    base, delta = normal((n,), 1, wide), normal((n,), 2, wide) * 1e3
    delta[::7] *= 1e-30  # denormal in 16 bits, and in float32 where it comes from float64
    expected = (base + torch.tensor(0.7, dtype=wide) * delta).float() if dtype.itemsize < 4 else base + 0.7 * delta
    padded = torch.full((n + 64,), 5.0, dtype=dtype)
    accumulate.add_round(base, delta, 0.7, dtype, out=padded[:n], backend="cpu")
    assert torch.equal(padded[:n], expected.to(dtype))
    assert padded[n:].eq(5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan_whatever_its_bits(dtype: torch.dtype) -> None:
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF, 0x7F80FFFF], dtype=torch.int32)
    delta = bits.view(torch.float32).repeat(20)
    assert accumulate.add_round(torch.zeros(120), delta, 1.0, dtype, backend="cpu").isnan().all()


def test_add_round_in_place_on_base_and_on_delta() -> None:
    base, delta = normal((3000,), 1), normal((3000,), 2)
    expected = accumulate.add_round(base, delta, 0.5, torch.float32)
    for target in (base, delta):
        operands = {"base": base.clone(), "delta": delta.clone()}
        out = operands["base" if target is base else "delta"]
        assert accumulate.add_round(**operands, scale=0.5, dtype=torch.float32, out=out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_mean_marks_the_model_that_is_not_finite(backend: str, bad: float) -> None:
    base, models = torch.zeros(50000), [torch.ones(50000), torch.ones(50000)]
    models[1][49999] = bad
    assert [math.isfinite(mean) for mean in accumulate.abs_means(base, models, backend=backend)] == [True, False]
    base[3] = math.inf
    models[0][3] = math.inf
    assert not any(math.isfinite(mean) for mean in accumulate.abs_means(base, models, backend=backend))


@pytest.mark.parametrize("backend", ["torch", "cpu", "cuda-emulated"], indirect=True)
def test_torchs_lazy_negation_is_heeded(backend: str) -> None:
    def lazily(x: torch.Tensor) -> torch.Tensor:
        negated: torch.Tensor = torch._neg_view(-x)
        assert negated.is_neg()
        return negated

    base, model = torch.randn(100), torch.randn(100)
    expected, means = accumulate.task_vector_sum(base, [model], [0.5], backend=backend)
    for x, y in ((lazily(base), model), (base, lazily(model))):
        found = accumulate.task_vector_sum(x, [y], [0.5], backend=backend)
        assert torch.equal(found[0], expected)
        assert found[1] == means == accumulate.abs_means(x, [y], backend=backend)
        assert accumulate.part_means(x, [y], [100], backend=backend) == [means]
        total = accumulate.finished(accumulate.filtered_sum(x, [y], [0.5], fm.HighPass(0.1), backend=backend)[0])
        assert torch.equal(total, accumulate.filtered_sum(base, [model], [0.5], fm.HighPass(0.1), backend=backend)[0])
        rounded = accumulate.add_round(x, y, 2.0, torch.bfloat16, backend=backend)
        assert torch.equal(rounded, accumulate.add_round(base, model, 2.0, torch.bfloat16, backend=backend))
        counts = [torch.zeros(256, dtype=torch.int64) for _ in range(2)]
        for both, into in zip(((x, y), (base, model)), counts, strict=True):
            accumulate.count_magnitudes(both[1], both[0], into, 23, 0)
        assert torch.equal(*counts)
    assert accumulate.norm([lazily(base)], backend=backend) == accumulate.norm([base], backend=backend)
    sums = torch.zeros(2, 2, 100)
    accumulate.elect(lazily(base), 1.0, sums[0].unbind(0))
    accumulate.elect(base, 1.0, sums[1].unbind(0))
    assert torch.equal(*sums)
    with pytest.raises(ArgumentError, match="out must be"):
        accumulate.task_vector_sum(base, [model], [0.5], out=lazily(base), backend=backend)


def test_bad_arguments_are_named() -> None:
    x, elsewhere = torch.zeros(4), torch.empty(4, device="meta")
    for call, message in [
        (lambda: accumulate.task_vector_sum(x, [x], [1.0, 2.0]), "weights must hold one number per model"),
        (lambda: accumulate.task_vector_sum(x, [x, torch.zeros(5)], [1.0, 1.0]), r"models\[1\] has shape \(5,\)"),
        (lambda: accumulate.task_vector_sum(x, [x.int()], [1.0]), r"models\[0\] must be float32"),
        (lambda: accumulate.abs_means(x, []), "models must hold at least one"),
        (lambda: accumulate.abs_means(x, [x], backend="gpu"), "backend must be"),
        (lambda: accumulate.add_round(x, x, 1.0, torch.float32, out=torch.zeros(5)), "out must be a contiguous"),
        (lambda: accumulate.task_vector_sum(x, [x], [1.0], out=x.double()), "out must be a contiguous"),
        (lambda: accumulate.task_vector_sum(x, [x], [1.0], out=elsewhere), "out must be a contiguous"),
        (lambda: accumulate.add_round(x, x, 1.0, torch.float32, out=elsewhere), "out must be a contiguous"),
        (lambda: accumulate.add_round(x, x, 1.0, torch.int32), "dtype must be float32"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 17, 33_000, 100_003])
def test_norm_is_the_same_for_any_number_of_threads(dtype: torch.dtype, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(count, generator=generator).to(dtype), torch.randn(3, 5, generator=generator).t().to(dtype)]
    expected = math.sqrt(math.fsum(float((t.double() ** 2).sum()) for t in tensors))
    results = []
    for threads in (1, 2):
        previous = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(accumulate.norm(tensors))
        finally:
            torch.set_num_threads(previous)
    assert results[0] == results[1]
    assert results[0] == pytest.approx(expected, rel=1e-12)
    assert accumulate.norm(tensors, backend="torch") == pytest.approx(expected, rel=1e-12)


def test_results_of_many_megabytes_ask_for_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("no transparent huge pages here")
    result = result_memory.empty((1 << 24,), torch.float32, torch.device("cpu"))
    middle = result.data_ptr() + (result.nbytes >> 1)
    flags: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()
    assert "hg" in flags


@settings(deadline=None, max_examples=60)
@given(case=cases(), cutoff=st.sampled_from([0.0, 0.1, 0.4, 0.9]))
def test_sum_and_filter_at_once_give_the_bytes_and_norms_of_one_after_the_other(
    case: tuple[torch.Tensor, list[torch.Tensor], list[float]], cutoff: float
) -> None:
    base, models, weights = case
    response = fm.HighPass(cutoff)
    want, want_means = accumulate.task_vector_sum(base, models, weights)
    before = accumulate.norm([want])
    got, means, norms = accumulate.filtered_sum(base, models, weights, response)
    assert means == want_means
    if norms is not None:
        fm.filter_(want, response)
        assert norms == (before, accumulate.norm([want]))
    assert torch.equal(got, want)


def test_one_matrix_is_summed_and_filtered_at_once_and_batches_are_not() -> None:
    for shape, once in (((1, 1, 30, 40), True), ((30, 40), True), ((2, 30, 40), False), ((40,), False)):
        base, *models = (normal(shape, i, torch.bfloat16) for i in range(3))
        *_, norms = accumulate.filtered_sum(base, models, [0.5, 0.5], fm.HighPass(0.4))
        assert (norms is not None) == once


@pytest.mark.parametrize("shape", [(30, 40), (2, 30, 40)])
def test_means_are_checked_before_the_sum_is_filtered(
    backend: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *models = (normal(shape, i) for i in range(3))
    told: list[Sequence[float]] = []

    def check(means: Sequence[float]) -> None:
        told.append(list(means))
        raise OverflowError

    def refuse(*arguments: object) -> None:
        raise AssertionError

    if backend == "cpu":  # others do both in one go, or leave the filter to the caller
        monkeypatch.setattr(CpuBackend, "executable", refuse)
    with pytest.raises(OverflowError):
        accumulate.filtered_sum(base, models, [1.0, 2.0], fm.HighPass(0.4), backend=backend, check=check)
    assert told == [accumulate.task_vector_sum(base, models, [1.0, 2.0])[1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 7, 64, 1000, (1 << 15) + 3])
def test_whether_the_result_is_finite_is_seen_while_it_is_written(
    dtype: torch.dtype, compute: torch.dtype, n: int
) -> None:
    largest = torch.finfo(dtype).max
    base, delta = torch.full((n,), largest, dtype=dtype), torch.zeros(n, dtype=compute)
    cpu, torch_backend = registry.named("cpu"), registry.named("torch")
    assert cpu is not None
    assert torch_backend is not None
    rounded = torch.empty_like(base)
    assert cpu.add_round(rounded, base, delta, 1.0, 1.0) is True
    assert torch.equal(rounded, base)
    for at in {0, n // 2, n - 1} if n else ():
        for wrong in (math.inf, -math.inf, math.nan, largest * 1.0 if dtype != torch.float64 else math.inf):
            delta[at] = wrong  # the last one overflows when it is rounded, or added
            assert cpu.add_round(rounded, base, delta, 1.0, 1.0) is False, (at, wrong)
            assert not rounded.isfinite().all()
            delta[at] = 0.0
    assert torch_backend.add_round(rounded, base, delta, 1.0, 1.0) is None


@pytest.mark.parametrize("wrong", [False, True])
def test_a_result_is_looked_at_unless_it_was_seen_to_be_finite(backend: str, wrong: bool) -> None:
    base, delta = torch.zeros(50), torch.full((50,), math.inf if wrong else 1.0)
    seen: list[torch.Tensor] = []
    result = accumulate.add_round(base, delta, 1.0, torch.float32, backend=backend, check=seen.append)
    assert len(seen) == int(wrong or backend != "cpu")
    assert all(tensor is result for tensor in seen)
