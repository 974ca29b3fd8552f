"""The filter within torch: gradients, compiled graphs, transforms."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck

import freemerge as fm
from cases import RESPONSES
from freemerge.cache import forget_all
from freemerge.filter import filter_ as _registered  # noqa: F401 (the operators)
from freemerge.ops import response_of, text_of

MASK = torch.randn(6, 7, generator=torch.Generator().manual_seed(1)).numpy()
CUSTOM = fm.Custom(MASK)  # neither even nor odd


def noise(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("response", [*RESPONSES, CUSTOM], ids=repr)
def test_text_and_back(response: fm.Response) -> None:
    assert response_of(text_of(response)) == response


@pytest.mark.parametrize("text", ["", "HighPass", "HighPass|cutoff=", "HighPass|cutoff=open('x')", "Nothing|a=1", "x"])
def test_text_that_names_no_response(text: str) -> None:
    with pytest.raises(fm.ArgumentError, match="response"):
        torch.ops.freemerge.filter(noise(3, 4), text)


@pytest.mark.parametrize("response", [*RESPONSES, CUSTOM], ids=repr)
@pytest.mark.parametrize("shape", [(6, 7), (2, 6, 7)])
def test_the_gradient_is_the_filtered_gradient(response: fm.Response, shape: tuple[int, ...]) -> None:
    x = noise(*shape, grad=True)
    assert torch.autograd.gradcheck(lambda x: fm.filtered(x, response, scale=-0.5), (x,))
    assert torch.equal(fm.filtered(x, response).detach(), fm.filtered(x.detach(), response))


@pytest.mark.parametrize("response", [fm.HighPass(0.3), fm.Center(-1), CUSTOM], ids=repr)
def test_the_adjoint_matches_the_mask(response: fm.Response) -> None:
    """<F x, y> = <x, F^T y> by the matrix of the filter, from the mask alone."""
    shape = (6, 7)
    mask = torch.from_numpy(response.mask(shape))
    columns = torch.eye(42, dtype=torch.float64).reshape(42, *shape)
    matrix = torch.fft.ifft2(mask * torch.fft.fft2(columns)).real.reshape(42, 42)  # row i: the image of entry i
    x = noise(*shape, grad=True)
    weights = noise(*shape) + 1
    (fm.filtered(x, response) * weights).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.flatten(), matrix @ weights.flatten(), atol=1e-12, rtol=0)


def test_higher_derivatives_and_vectors() -> None:
    for shape in ((9,), (5, 6)):
        x = noise(*shape, grad=True)
        assert torch.autograd.gradgradcheck(lambda x: fm.filtered(x, fm.Gaussian(0.2)) ** 3, (x,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("grad", [False, True])
def test_a_tangent_is_not_lost(grad: bool) -> None:
    x = noise(5, 6, grad=grad)
    fm.filtered(x, fm.HighPass(0.3))  # makes the route
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, noise(5, 6))
        for function in (fm.filtered, fm.filter_):
            for given, name in ((dual, "x"), ([x, dual], r"x\[1\]")):
                with pytest.raises(fm.ArgumentError, match=rf"^{name} has a tangent"):
                    function(given, fm.HighPass(0.3))
        assert torch.equal(fm.filtered(noise(5, 6), fm.HighPass(0.3)), fm.filtered(x.detach(), fm.HighPass(0.3)))
        with pytest.raises(fm.ArgumentError, match="x must be a dense tensor"):
            fm.filtered(noise(5, 6).to_sparse(), fm.HighPass(0.3))


def test_lists_with_gradients() -> None:
    x, y = noise(5, 6, grad=True), noise(4)
    first, second = fm.filtered([x, y], fm.HighPass(0.3))
    assert first.requires_grad
    assert not second.requires_grad
    assert isinstance(fm.filtered((x, y), fm.HighPass(0.3)), tuple)
    with pytest.raises(fm.ArgumentError, match="part of an autograd graph"):
        fm.filter_(x * 1, fm.HighPass(0.3))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", ["2", True, None, torch.tensor(2.0), float("nan"), 1e300])
def test_a_graph_takes_no_other_scale(scale: object, compiled: bool) -> None:
    x = noise(3, 4, dtype=torch.float32, grad=True)
    for function in (fm.filtered, fm.filter_):
        torch._dynamo.reset()
        call = torch.compile(function, backend="eager") if compiled else function
        with pytest.raises(fm.ArgumentError, match=r"^scale must be a finite number"):
            call(x, fm.HighPass(0.3), scale=scale)  # type: ignore[operator]


def test_compiled_calls_name_a_wrong_response_and_backend() -> None:
    for function in (fm.filtered, fm.filter_):
        for response, backend, message in (("HighPass", "auto", "response must"), (fm.HighPass(0.3), None, "backend")):
            torch._dynamo.reset()
            with pytest.raises(fm.ArgumentError, match=message):
                torch.compile(function, backend="eager")(noise(3, 4), response, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(0, 3, requires_grad=True), "must have at least one axis"),
        (torch.zeros(0, 3), "must have at least one axis"),
        (torch.zeros(3, 3, dtype=torch.complex64, requires_grad=True), "must have dtype"),
        (torch.ones(3, 3).to_sparse(), "must be a dense tensor"),
        (3, "must be a tensor"),
    ],
)
def test_a_list_with_gradients_names_the_tensor(item: object, message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=rf"^x\[1\] {message}"):
        fm.filtered([noise(3, 4, grad=True), item], fm.HighPass(0.3))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_updates_a_leaf_as_a_plain_one_does(backend: str) -> None:
    leaf, expected = noise(5, 6, grad=True), fm.filtered(noise(5, 6), fm.HighPass(0.3))
    torch._dynamo.reset()
    torch.compile(fm.filter_, fullgraph=True, backend=backend)(leaf, fm.HighPass(0.3))
    assert leaf.is_leaf
    assert torch.equal(leaf, expected)
    with pytest.raises(fm.ArgumentError):
        torch.compile(fm.filter_, backend=backend)(torch.zeros(0, 3, requires_grad=True), fm.HighPass(0.3))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (7,)),
        (torch.float64, (5, 6)),
        (torch.bfloat16, (2, 5, 6)),
        (torch.float16, (6, 5)),
    ],
)
def test_opcheck(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for response in (fm.HighPass(0.3), fm.Center(-1)):
        text = text_of(response)
        opcheck(torch.ops.freemerge.filter.default, (noise(*shape, dtype=dtype), text))
        opcheck(torch.ops.freemerge.filter.default, (noise(*shape, dtype=dtype, grad=True), text, -2.0, "auto"))
        opcheck(torch.ops.freemerge.filter_.default, (noise(*shape, dtype=dtype), text, 0.5, "auto"))


@pytest.mark.parametrize("traced", [False, True])
def test_a_mask_lives_as_long_as_the_graph_that_needs_it(traced: bool) -> None:
    class Smooth(torch.nn.Module):
        response: fm.Response | None = fm.Custom(MASK + 1)

        def forward(self, x: Tensor) -> Tensor:
            assert self.response is not None
            return fm.filtered(x, self.response)

    model, x = Smooth(), noise(6, 7, grad=True)
    made = torch.export.export(model, (x,)).module() if traced else model
    y = made(x)
    Smooth.response = None
    del model
    forget_all()
    gc.collect()
    (made(x) if traced else y).sum().backward()
    torch.testing.assert_close(x.grad, fm.filtered(torch.ones(6, 7, dtype=torch.float64), fm.Custom(MASK + 1)))


def test_masks_are_let_go_with_the_graphs_that_needed_them() -> None:
    kept = []
    for i in range(40):
        response = fm.Custom(MASK + i)
        kept.append(weakref.ref(response))
        fm.filtered(noise(6, 7, grad=True), response).sum().backward()
    del response
    forget_all()
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def graphs(function: Callable[..., object], *arguments: object) -> tuple[object, list[list[str]]]:
    """What a function gives when it is compiled as one graph, and the nodes of the graph that are ours."""
    seen: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        seen.append([str(node.target) for node in graph.graph.nodes if "freemerge" in str(node.target)])
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)(*arguments), seen


@pytest.mark.parametrize(
    "response", [fm.HighPass(0.3), fm.Gaussian(0.2), fm.Official(0.7), fm.Center(-1), CUSTOM], ids=repr
)
def test_compiled_without_a_graph_break(response: fm.Response) -> None:
    def work(x: Tensor) -> Tensor:
        y = x * 2
        fm.filter_(y, response, scale=0.5)
        a, b = fm.filtered([y, x], response)
        return a + 3 * b

    x = noise(6, 7)
    result, seen = graphs(work, x)
    assert torch.equal(result, work(x))  # type: ignore[arg-type]
    assert seen == [["freemerge.filter_", "freemerge.filter", "freemerge.filter"]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (fm.HighPass(0.3), fm.HighPass(0.2)),
        (fm.BandGain(0.2, low=0.5, high=1.5), fm.BandGain(0.2, low=1.5, high=0.5)),
        (fm.Butterworth(0.2, order=2), fm.Butterworth(0.2, order=3)),
        (fm.Official(0.7), fm.Official(0.5)),
        (fm.Center(-1), fm.Center(-2)),
    ],
    ids=repr,
)
def test_no_number_of_a_response_becomes_a_variable(first: fm.Response, second: fm.Response) -> None:
    """As torch.compile makes of those that change between calls, or of all with dynamic=True."""

    def work(x: Tensor, response: fm.Response) -> Tensor:
        return fm.filtered(x, response) * 2

    x = noise(6, 7)
    for dynamic in (None, True):
        torch._dynamo.reset()
        compiled = torch.compile(work, fullgraph=True, dynamic=dynamic, backend="eager")
        for response in (first, second):
            assert torch.equal(compiled(x, response), work(x, response))


def test_a_response_made_within_the_graph() -> None:
    def work(x: Tensor) -> Tensor:
        return fm.filtered(x, fm.HighPass(0.25, metric="normalized"))

    x = noise(6, 7)
    result, seen = graphs(work, x)
    assert torch.equal(result, work(x))  # type: ignore[arg-type]
    assert len(seen) == 1


def test_compiled_gradients() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(7, 6).double()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(x)
            fm.filter_(hidden, fm.LowPass(0.4))
            return fm.filtered(hidden, fm.HighPass(0.1), scale=3.0)

    layer, x = Layer(), noise(5, 7)
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    compiled = layer.inner.weight.grad
    layer.inner.weight.grad = None
    hidden = fm.filtered(layer.inner(x), fm.LowPass(0.4))
    fm.filtered(hidden, fm.HighPass(0.1), scale=3.0).square().sum().backward()
    torch.testing.assert_close(compiled, layer.inner.weight.grad)


def test_exported() -> None:
    class Smooth(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fm.filtered(x + 1, fm.LowPass(0.2))

    x = noise(6, 7)
    program = torch.export.export(Smooth(), (x,))
    assert torch.equal(program.module()(x), Smooth()(x))


@pytest.mark.parametrize("shape", [(3, 5, 6), (3, 9), (3, 2, 4, 5)])
def test_vmap(shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    text = text_of(fm.HighPass(0.3))
    expected = torch.stack([fm.filtered(item, fm.HighPass(0.3)) for item in x])
    # A batch and a single matrix may take other kernels.
    torch.testing.assert_close(torch.func.vmap(lambda x: torch.ops.freemerge.filter(x, text))(x), expected)
    last = torch.func.vmap(lambda x: torch.ops.freemerge.filter(x, text), in_dims=-1, out_dims=-1)(x.movedim(0, -1))
    torch.testing.assert_close(last, expected.movedim(0, -1))


def test_the_operators_are_there_after_an_import_of_the_filter() -> None:
    program = (
        "import torch; from freemerge import filtered, HighPass; x = torch.randn(5, 6)\n"
        "f = lambda x: filtered(x, HighPass(0.3))\n"
        "assert torch.equal(torch.compile(f, fullgraph=True, backend='eager')(x), f(x))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_merging_does_not_wait_for_the_compiler() -> None:
    code = "import freemerge.merging.run, sys; assert 'torch._dynamo' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
