"""The registry: which backends there are, which one it picks, and what it says where none can."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import freemerge as fm
from freemerge.accumulate import abs_means
from freemerge.backends import registry
from freemerge.backends.base import Backend, BackendInfo, Executable
from freemerge.backends.torch import TorchBackend
from freemerge.errors import ArgumentError, BackendError
from freemerge.experts.select import ModelSelector, Selection
from freemerge.planner.plan import Plan


class Absent(TorchBackend):
    """A backend whose device is missing."""

    name = "absent"
    preference = -1

    def info(self) -> BackendInfo:
        return BackendInfo(self.name, False, "there is no such device")


class Narrow(TorchBackend):
    """A backend of float32 vectors."""

    name = "narrow"
    preference = -2

    def takes(self, tensors: Sequence[torch.Tensor]) -> str | None:
        return None if all(tensor.dtype == torch.float32 for tensor in tensors) else "needs float32 tensors"


def test_every_backend_is_found_in_the_order_of_preference() -> None:
    assert [backend.name for backend in registry.BACKENDS] == ["cuda", "cpu", "torch"]
    assert [*fm.backends()] == ["cuda", "cpu", "torch"]


def test_auto_passes_over_what_is_absent_or_does_not_take_the_tensors() -> None:
    with registry.using(TorchBackend(), Absent(), Narrow()):
        assert [backend.name for backend in registry.BACKENDS] == ["narrow", "absent", "torch"]
        assert registry.pick("auto", (torch.ones(2),)).name == "narrow"
        assert registry.pick("auto", (torch.ones(2).double(),)).name == "torch"
        plan = fm.explain((8, 8), fm.HighPass(0.3))
        assert plan.backend == "narrow"
    with registry.using(TorchBackend(), Absent()):
        plan = fm.explain((8, 8), fm.HighPass(0.3))
        assert plan.backend == "torch"
        assert "backend absent is not available: there is no such device" in plan.reason
    assert fm.explain((8, 8), fm.HighPass(0.3)).backend == "cpu"


def test_a_backend_asked_for_by_name_runs_or_says_why() -> None:
    x = torch.ones(4, 4)
    with registry.using(TorchBackend(), Absent(), Narrow()):
        for operation in (
            lambda: fm.filter_(x, fm.HighPass(0.3), backend="absent"),
            lambda: abs_means(x, [x], backend="absent"),
            lambda: fm.merge({"w": x}, [{"w": x}], backend="absent"),
        ):
            with pytest.raises(BackendError, match="backend absent is not available: there is no such device"):
                operation()
        with pytest.raises(ArgumentError, match="backend 'narrow' needs float32 tensors"):
            abs_means(x.double(), [x], backend="narrow")
        with pytest.raises(ArgumentError, match="one of 'narrow', 'absent', 'torch', got 'cpu'"):
            abs_means(x, [x], backend="cpu")
    with registry.using(Narrow()), pytest.raises(BackendError, match="no backend takes tensors of"):
        abs_means(x.double(), [x])


def test_an_executable_is_prepared_once_and_let_go_when_the_backends_change() -> None:
    prepared: list[Plan] = []

    class Counting(TorchBackend):
        def prepare(self, plan: Plan) -> Executable:
            prepared.append(plan)
            return super().prepare(plan)

    with registry.using(Counting()):
        for _ in range(3):
            fm.filter_(torch.ones(8, 9), fm.HighPass(0.3))
            fm.filter_(torch.ones(2, 8, 9), fm.HighPass(0.3))
        first = len(prepared)
    with registry.using(Counting()):
        fm.filter_(torch.ones(8, 9), fm.HighPass(0.3))
    assert first <= 2  # a plan for one matrix, another for a batch at most
    assert len(prepared) == first + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_model_scope_is_the_same_on_every_backend(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(n, 7, generator=generator).to(dtype) for _ in range(2)] for n in (0, 30, 900)]
    pairs[1][0][3] = pairs[1][1][3]  # zeros
    pairs[2][0][5:9] = pairs[2][1][5:9] + 1.0  # ties

    def selected(backend: Backend) -> list[Selection]:
        with registry.using(backend):
            selector = ModelSelector()
            for model, base in pairs:
                selector.count(model, base)
            for model, base in pairs:
                selector.collect(model, base, 500)
            return selector.finish(500)

    (native,) = (backend for backend in registry.BACKENDS if backend.name == "cpu")
    for one, two in zip(selected(native), selected(TorchBackend()), strict=True):
        assert torch.equal(one.indices, two.indices)
        assert torch.equal(one.values, two.values)
