"""The public filter: what it takes, what it refuses, and the algebra of filters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import freemerge as fm
from freemerge.accumulate import task_vector_sum
from freemerge.planner.forms import ERROR_LIMIT
from in_memory import noise

BACKENDS = ["auto", *(name for name, info in fm.backends().items() if info.available and name != "cuda")]
AVAILABLE = pytest.mark.parametrize("backend", BACKENDS)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return float((a.double() - b.double()).norm()) <= tolerance * (float(b.double().norm()) + 1e-3)


@AVAILABLE
def test_in_place_and_returned(backend: str) -> None:
    x = noise(40, 60)
    expected = fm.filtered(x, fm.HighPass(0.1), scale=2.0, backend=backend)
    assert not torch.equal(x, expected)
    assert fm.filter_(x, fm.HighPass(0.1), scale=2.0, backend=backend) is x
    assert torch.equal(x, expected)


@AVAILABLE
def test_a_list_of_mixed_shapes_and_dtypes(backend: str) -> None:
    tensors = [noise(40, 60), noise(40, 60, seed=1), noise(33), noise(3, 8, 9), noise(40, 60, dtype=torch.bfloat16)]
    single = [fm.filtered(x, fm.HighPass(0.2), backend=backend) for x in tensors]
    assert fm.filter_(tensors, fm.HighPass(0.2), backend=backend) is tensors
    assert all(torch.equal(a, b) for a, b in zip(tensors, single, strict=True))


@AVAILABLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(backend: str, dtype: torch.dtype) -> None:
    whole = noise(90, 140, dtype=dtype)
    views = {
        "rows": lambda x: x[::2],
        "columns": lambda x: x[:, ::2],
        "block": lambda x: x[3:70, 5:100],
        "transposed": lambda x: x.t(),
        "transposed block": lambda x: x.t()[7:120, 1:80],
        "column": lambda x: x[:, 7],
        "one row": lambda x: x[5:6],
        "permuted batch": lambda x: x.view(10, 9, 140).permute(1, 2, 0),
    }
    for name, view in views.items():
        memory = whole.clone()
        expected = fm.filtered(view(whole).contiguous(), fm.HighPass(0.1), backend=backend)
        fm.filter_(view(memory), fm.HighPass(0.1), backend=backend)
        assert close(view(memory), expected, 1e-6 if dtype == torch.float32 else 5e-3), name
        untouched = torch.ones_like(whole, dtype=torch.bool)
        view(untouched).zero_()
        assert torch.equal(memory[untouched], whole[untouched]), f"{name}: nothing else was written"


def test_numpy_and_dlpack() -> None:
    x = noise(20, 30)
    expected = fm.filtered(x, fm.HighPass(0.2))
    array = x.numpy().copy()
    assert fm.filter_(array, fm.HighPass(0.2)) is array
    assert np.array_equal(array, expected.numpy())

    class Producer:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, **options: object) -> object:
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.tensor.__dlpack_device__()

    producer = Producer(x.clone())
    fm.filter_(producer, fm.HighPass(0.2))
    assert torch.equal(producer.tensor, expected)


@pytest.mark.parametrize("function", [fm.filter_, fm.filtered])
def test_a_mask_of_entries_is_refused_and_not_ignored(function: Callable[..., object]) -> None:
    array = np.ma.masked_array(np.ones((4, 5)), np.eye(4, 5))
    for x, name in ((array, "x"), ([array], r"x\[0\]")):
        with pytest.raises(fm.ArgumentError, match=rf"^{name} is a masked array.*pass {name}.filled\(0\)$"):
            function(x, fm.HighPass(0.2))


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_subclass_of_arrays_comes_back_as_it_is() -> None:
    matrix = np.asmatrix(noise(4, 5).numpy())
    assert type(fm.filtered(matrix, fm.HighPass(0.2))) is np.matrix


@AVAILABLE
def test_parameters_are_updated_outside_autograd(backend: str) -> None:
    parameter = torch.nn.Parameter(noise(16, 16))
    expected = fm.filtered(parameter.detach(), fm.HighPass(0.2), backend=backend)
    fm.filter_(parameter, fm.HighPass(0.2), backend=backend)
    assert torch.equal(parameter.detach(), expected)
    assert parameter.grad_fn is None


@dataclass(frozen=True)
class Diagonal(fm.Response):
    """A user's own response: a gain, symmetric as gains must be; the sizes are odd, so that it is."""

    def gain(self, ky: np.ndarray, kx: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return 1 / (1 + 0.1 * (ky - kx) ** 2)


@AVAILABLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("response", [fm.Custom(np.random.default_rng(0).random((21, 31))), Diagonal()], ids=type)
def test_masks_without_a_closed_form(backend: str, dtype: torch.dtype, response: fm.Response) -> None:
    if backend == "cpu" and dtype == torch.float64:
        with pytest.raises(fm.BackendError, match="tables of gains are fp32"):
            fm.filtered(noise(21, 31, dtype=dtype), response, backend=backend)
        return
    mask = torch.from_numpy(response.mask((21, 31)))
    for x in (noise(21, 31, dtype=dtype), noise(31, 21, dtype=dtype).t()):
        expected = torch.fft.ifft2(mask * torch.fft.fft2(x.double())).real
        fm.filter_(x, response, backend=backend)
        assert close(x, expected, 5e-7 if dtype == torch.float32 else 1e-14)


@AVAILABLE
@pytest.mark.parametrize("response", [fm.HighPass(0), fm.HighPass(0.05), fm.HighPass(0.3)], ids=str)
def test_inference_tensors(backend: str, response: fm.Response) -> None:
    with torch.inference_mode():
        x = noise(60, 70)
    expected = fm.filtered(x.clone(), response, scale=2.0, backend=backend)
    assert torch.equal(fm.filter_(x, response, scale=2.0, backend=backend), expected)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 3, dtype=torch.int32), "x must have dtype"),
        (torch.zeros(3, 3, dtype=torch.complex64), "x must have dtype"),
        (torch.zeros(()), "x must have at least one axis"),
        (torch.zeros(0, 3), "x must have at least one axis and one entry"),
        (torch.zeros(3, 1).expand(3, 4), "x may overlap itself"),
        ("tensor", "x must be a tensor"),
        ([torch.zeros(2, 2), 3], r"x\[1\] must be a tensor"),
        (torch.zeros(3, 3).to_sparse(), "x must be a dense tensor"),
        (np.zeros((3, 3)).astype(int), "x must have dtype"),
    ],
)
def test_bad_tensors_are_named(x: object, message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        fm.filter_(x, fm.HighPass(0.1))
    if "overlap" not in message:  # a copy does not
        with pytest.raises(fm.ArgumentError, match=message):
            fm.filtered(x, fm.HighPass(0.1))


def test_tensors_that_share_memory_are_refused() -> None:
    x = noise(8, 8)
    with pytest.raises(fm.ArgumentError, match="share memory"):
        fm.filter_([x[:5], x[3:]], fm.HighPass(0.1))
    fm.filter_([x[:, :4], x[:, 4:]], fm.HighPass(0.1))


@AVAILABLE
@pytest.mark.parametrize(
    ("last", "options", "message"),
    [
        (lambda x: torch.zeros(5, 7, dtype=torch.int32), {}, r"x\[1\] must have dtype"),
        (lambda x: torch.zeros(5, 1).expand(5, 7), {}, r"x\[1\] may overlap itself"),
        (lambda x: x[2:], {}, r"x\[0\] and x\[1\] share memory"),
        (lambda x: 3, {}, r"x\[1\] must be a tensor"),
        (lambda x: noise(7, 5), {"response": fm.Custom(np.ones((5, 7)))}, "mask has shape"),
        (lambda x: noise(5, 7), {"scale": float("nan")}, "scale must be"),
        (lambda x: noise(5, 7, dtype=torch.bfloat16), {"scale": 1e39}, "scale must be"),
    ],
)
def test_nothing_is_written_of_a_list_that_is_refused(
    backend: str, last: Callable[[torch.Tensor], object], options: dict[str, Any], message: str
) -> None:
    x = noise(5, 7, dtype=torch.float64 if "scale" in options else torch.float32)  # which alone would take 1e39
    before, second = x.clone(), last(x)
    with pytest.raises(fm.ArgumentError, match=message):
        fm.filter_([x, second], **{"response": fm.HighPass(0.1), "backend": backend, **options})
    assert torch.equal(x, before)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the other backends refuse nothing")
def test_nothing_is_written_of_a_list_that_a_backend_refuses() -> None:
    x = noise(21, 31)
    before = x.clone()
    with pytest.raises(fm.BackendError, match="tables of gains are fp32"):
        fm.filter_([x, noise(21, 31, dtype=torch.float64)], Diagonal(), backend="cpu")
    assert torch.equal(x, before)
    fm.filter_([x], Diagonal(), backend="cpu")
    assert not torch.equal(x, before)


def test_bad_options_are_named() -> None:
    x = noise(8, 8)
    with pytest.raises(fm.ArgumentError, match="response must be"):
        fm.filter_(x, 0.4)  # type: ignore[arg-type]
    with pytest.raises(fm.ArgumentError, match="scale must be"):
        fm.filter_(x, fm.HighPass(0.1), scale=float("nan"))
    with pytest.raises(fm.ArgumentError, match="scale must be"):
        fm.filter_(x, fm.HighPass(0.1), scale=1e39)
    with pytest.raises(fm.ArgumentError, match="backend must be"):
        fm.filter_(x, fm.HighPass(0.1), backend="mkl")
    with pytest.raises(fm.ArgumentError, match="backend must be"):
        fm.filter_([], fm.HighPass(0.1), backend="mkl")
    with pytest.raises(fm.ArgumentError, match="backend must be"):
        fm.filter_(x, fm.HighPass(0.1), backend=["cpu"])  # type: ignore[arg-type]
    with pytest.raises(fm.ArgumentError, match="whole numbers"):
        fm.explain((4.7, 5), fm.HighPass(0.1))  # type: ignore[arg-type]
    with pytest.raises(fm.ArgumentError, match="shape of whole numbers"):
        fm.explain(3, fm.HighPass(0.1))  # type: ignore[arg-type]
    with pytest.raises(fm.ArgumentError, match="mask has shape"):
        fm.filter_(x, fm.Custom(np.zeros((3, 3))))


@AVAILABLE
@pytest.mark.parametrize(("cutoff", "scale"), [(9.0, 1.0), (0.4, 0.0), (0.05, 0.0)])
def test_nothing_is_left_of_what_is_multiplied_by_zero(backend: str, cutoff: float, scale: float) -> None:
    x = noise(64, 48)
    x[3, 4] = float("nan")
    assert not fm.filtered(x, fm.HighPass(cutoff), scale=scale, backend=backend).any()


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    if fm.backends().get("cuda") is None or fm.backends()["cuda"].available:
        pytest.skip("needs a build that knows the CUDA backend on a machine without a GPU")
    with pytest.raises(fm.BackendError, match="cuda"):
        fm.filter_(noise(8, 8), fm.HighPass(0.1), backend="cuda")


def test_explain() -> None:
    plan = fm.explain((4096, 11008), fm.HighPass(0.05))
    assert plan.form == "decimated"
    assert plan.error_bound <= ERROR_LIMIT[torch.float32]
    assert plan.workspace_bytes < 0.15 * 4 * 4096 * 11008
    assert "because" in str(plan)
    assert fm.explain((8, 8), fm.HighPass(0)).form == "identity"
    assert fm.explain((8, 8), fm.HighPass(9)).form == "scale"
    assert fm.explain(noise(8, 8, dtype=torch.float64), fm.HighPass(0.3)).dtype == torch.float64


def test_explain_names_what_is_wrong() -> None:
    with pytest.raises(fm.ArgumentError, match="device must be one that torch knows, got 'gpu'"):
        fm.explain((8, 8), fm.HighPass(0.1), device="gpu")
    with pytest.raises(fm.ArgumentError, match="x must be a dense tensor"):
        fm.explain(torch.eye(8).to_sparse(), fm.HighPass(0.1))
    with pytest.raises(fm.ArgumentError, match="x is of type NestedTensor"):
        fm.explain(torch.nested.nested_tensor([noise(8, 8)], layout=torch.jagged), fm.HighPass(0.1))


def test_explain_tells_how_a_tensor_is_reached() -> None:
    x, response = noise(60, 90), fm.HighPass(0.2)
    plan = fm.explain(x.t(), response)
    assert plan.layout.flipped
    assert not plan.layout.copied
    assert plan.shape == (60, 90), "the transpose is filtered"
    assert "input      90 x 60" in str(plan)
    assert "the transpose is filtered" in str(plan)
    assert repr(response) in str(plan)
    assert fm.explain(x[:, ::2], response).layout.copied
    assert "copied out and back" in str(fm.explain(x[:, ::2], response))
    assert fm.explain(x[::2], response) == fm.explain((30, 90), response)
    assert not fm.explain(x[::2], response).layout.copied


@AVAILABLE
def test_a_list_of_tensors_of_inference_and_others(backend: str) -> None:
    with torch.inference_mode():
        frozen = noise(16, 24)
    x, want = noise(16, 24), fm.filtered(noise(16, 24), fm.HighPass(0.2), backend=backend)
    version = x._version
    fm.filter_([frozen, x], fm.HighPass(0.2), backend=backend)
    assert torch.equal(x, want)
    assert torch.equal(frozen, want)
    assert x._version > version


sizes = st.integers(1, 70)
cutoffs = st.floats(0.01, 1.0)


@AVAILABLE
@settings(deadline=None, max_examples=25)
@given(height=sizes, width=sizes, cutoff=cutoffs, seed=st.integers(0, 99))
def test_algebra_of_ideal_filters(backend: str, height: int, width: int, cutoff: float, seed: int) -> None:
    x, y = noise(height, width, seed=seed), noise(height, width, seed=seed + 100)
    high, low = fm.HighPass(cutoff), fm.LowPass(cutoff)
    filtered = fm.filtered(x, high, backend=backend)
    assert close(fm.filtered(filtered, high, backend=backend), filtered, 3e-6), "idempotent"
    assert close(filtered + fm.filtered(x, low, backend=backend), x, 3e-6), "the two parts make the whole"
    both = fm.filtered(2 * x - 3 * y, high, backend=backend)
    assert close(2 * filtered - 3 * fm.filtered(y, high, backend=backend), both, 1e-5), "linear"


@AVAILABLE
@pytest.mark.parametrize("cutoff", [0.02, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bytes_for_any_number_of_threads(backend: str, cutoff: float, dtype: torch.dtype) -> None:
    x = noise(500, 700, dtype=dtype)
    batch = noise(5, 64, 96, dtype=dtype)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([fm.filtered(t, fm.HighPass(cutoff), backend=backend) for t in (x, batch)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_loses_the_same_mean_for_any_number_of_threads() -> None:
    row = noise(1_000_001, dtype=torch.float64) + 1
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fm.filtered(row, fm.Center(), backend="torch"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@AVAILABLE
@pytest.mark.parametrize("shape", [(300, 400), (257, 129)])
def test_a_large_mean_does_not_drown_the_result(backend: str, shape: tuple[int, int]) -> None:
    """|y| << |V|: the error stays in proportion to the result, as in an exact transform."""
    signal = noise(*shape, dtype=torch.float64)
    x = (signal + 300).float()
    expected = fm.filtered(x.double(), fm.HighPass(0.03), backend="torch")
    assert close(fm.filtered(x, fm.HighPass(0.03), backend=backend), expected, 2e-5)


@AVAILABLE
@pytest.mark.parametrize("scale", [1e-36, -3e-38, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("response", [fm.HighPass(0.3), fm.LowPass(0.02), fm.HighPass(0)], ids=str)
def test_a_tiny_scale_costs_no_digits(backend: str, scale: float, dtype: torch.dtype, response: fm.Response) -> None:
    x = noise(200, 300, dtype=dtype) * 1e3
    expected = fm.filtered(x.double(), response, backend="torch") * scale
    for y in (
        fm.filtered(x, response, scale=scale, backend=backend),
        fm.filtered(x.t().contiguous().t(), response, scale=scale, backend=backend),
    ):
        if abs(scale) < 1e-100 and dtype != torch.float64:
            assert not y.any()
        else:
            tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-6
            assert close(y.double() / abs(scale), expected / abs(scale), tolerance)


@AVAILABLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_is_no_number_of_float32(backend: str, dtype: torch.dtype) -> None:
    x = noise(200, 300, dtype=dtype) * 1e30
    expected = fm.filtered(x.double(), fm.HighPass(0.3), backend="torch") * 1e-50
    y = fm.filtered(x, fm.HighPass(0.3), scale=1e-50, backend=backend)
    assert close(y.double() * 1e20, expected * 1e20, 4e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="the processor cannot flush them")
def test_denormals_are_flushed_in_every_thread_or_in_none() -> None:
    threads, results = torch.get_num_threads(), []
    x = noise(400, 300) * 1e-38
    base, model = noise(200_000) * 1e-38, noise(200_000, seed=1) * 1e-38
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            fm.filtered(noise(64, 64), fm.HighPass(0.1))  # starts threads
            for flush in (False, True):
                torch.set_flush_denormal(flush)
                filtered = fm.filtered(x, fm.HighPass(0.3))
                total = task_vector_sum(base, [model], [0.5])[0]
                torch.set_flush_denormal(False)
                results.append((filtered, total))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    for i, both in enumerate(results):
        assert all(map(torch.equal, both, results[i % 2])), f"flush {i % 2} with {i // 2 + 1} threads"
    assert not torch.equal(results[0][1], results[1][1])


@AVAILABLE
def test_larger_shapes_against_float64(backend: str) -> None:
    for shape, response in (
        ((768, 768), fm.HighPass(0.05)),
        ((1009, 1013), fm.HighPass(0.05)),
        ((1009, 1013), fm.HighPass(0.4)),
        ((2304, 768), fm.Official(0.7)),
        ((2305, 768), fm.Official(0.7)),
        ((5000, 96), fm.HighPass(0.02)),
    ):
        x, plan = noise(*shape), fm.explain(shape, response, backend=backend)
        mask = torch.from_numpy(response.mask(shape))
        expected = torch.fft.ifft2(mask * torch.fft.fft2(x.double())).real
        error = (fm.filtered(x, response, backend=backend).double() - expected).norm() / x.double().norm()
        assert error <= mask.abs().max() * plan.error_bound, plan
