"""Gives tensors without memory of their own to every public function, in a process of its own, which may crash.

Prints what became of each as JSON lines: tensor, function, outcome.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import return_and_correct_aliasing

import freemerge as fm

SHAPE = (6, 8)


class Int8(Tensor):
    """A quantised weight as torchao makes them: a wrapper of whole numbers and a scale."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: float) -> Int8:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32, device=numbers.device)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, numbers: Tensor, scale: float) -> None:
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [x.numbers.float() * x.scale if isinstance(x, Int8) else x for x in args]
        if func is torch.ops.aten.detach.default:
            return return_and_correct_aliasing(func, args, kwargs or {}, Int8(args[0].numbers, args[0].scale))
        return func(*plain, **(kwargs or {}))


class Named(Tensor):
    """A subclass that is a plain tensor for all but Python."""


def cut(nbytes: int) -> Tensor:
    x = torch.randn(SHAPE)
    x.untyped_storage().resize_(nbytes)
    return x


def sharded_module() -> Tensor:
    layer = nn.Linear(8, 6)
    fully_shard(layer)
    return layer.weight


def big_endian() -> Any:
    return np.zeros(SHAPE, dtype=">f4")


def read_only() -> Any:
    array = np.zeros(SHAPE, dtype=np.float32)
    array.flags.writeable = False
    return array


class Produced:
    """A DLPack producer of read-only memory."""

    def __dlpack__(self, **options: Any) -> Any:
        return read_only().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return read_only().__dlpack_device__()


NUMPY = {
    "big-endian": big_endian,
    "read-only": read_only,
    "read-only DLPack": Produced,
    "negative strides": lambda: np.zeros(SHAPE, dtype=np.float32)[::-1],
    "objects": lambda: np.zeros(SHAPE, dtype=object),
    "text": lambda: "tensor",
}


def foreign() -> dict[str, Callable[[], Any]]:
    mesh = init_device_mesh("cpu", (2,))

    def distributed(placement: Any) -> Callable[[], Tensor]:
        return lambda: DTensor.from_local(torch.randn(SHAPE), mesh, [placement], run_check=False)

    return {
        "sharded DTensor": distributed(Shard(0)),
        "partial DTensor": distributed(Partial()),
        "FSDP2": sharded_module,
        "FakeTensor": lambda: FakeTensorMode().from_tensor(torch.randn(SHAPE)),
        "quantised wrapper": lambda: Int8(torch.ones(SHAPE, dtype=torch.int8), 0.5),
        "COO": lambda: torch.randn(SHAPE).to_sparse(),
        "CSR": lambda: torch.randn(SHAPE).to_sparse_csr(),
        "MKLDNN": lambda: torch.randn(SHAPE).to_mkldnn(),
        "nested": lambda: torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)]),
        "jagged": lambda: torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged),
        "meta": lambda: torch.empty(SHAPE, device="meta"),
        "quantised": lambda: torch.quantize_per_tensor(torch.randn(SHAPE), 0.1, 0, torch.quint8),
        "lazy": lambda: nn.LazyLinear(6).weight,
        "freed": lambda: cut(0),
        "cut": lambda: cut(64),
        "negated": lambda: torch.randn(SHAPE, dtype=torch.complex64).conj().imag,
        "conjugated": lambda: torch.randn(SHAPE, dtype=torch.complex64).conj(),
        **NUMPY,
    }


def welcome() -> dict[str, Callable[[], Any]]:
    mesh = init_device_mesh("cpu", (2,))
    one = init_device_mesh("cpu", (1, 2), mesh_dim_names=("one", "two"))["one"]
    return {
        "Parameter": lambda: nn.Parameter(torch.randn(SHAPE)),
        "Buffer": lambda: nn.Buffer(torch.randn(SHAPE)),
        "Named": lambda: torch.randn(SHAPE).as_subclass(Named),
        "replicated DTensor": lambda: DTensor.from_local(torch.randn(SHAPE), mesh, [Replicate()], run_check=False),
        "DTensor of one rank": lambda: DTensor.from_local(torch.randn(SHAPE), one, [Shard(0)], run_check=False),
        "in a larger storage": lambda: torch.randn(20, 8)[3:9],
    }


def functions() -> dict[str, Callable[[Any], object]]:
    plain, layer = torch.zeros(SHAPE), nn.Linear(8, 6, bias=False)
    expert = fm.extract_experts({"w": plain}, {"task": {"w": plain + 1}})
    router = fm.Router.fit(torch.randn(20, 8), ["a", "b"] * 10, hidden=4, steps=2)

    def switched(x: Any) -> None:
        bank = fm.ExpertBank({"w": x}, expert)
        with bank.active("task"):
            pass

    def routed(x: Any) -> None:
        bank = fm.ExpertBank(layer, {"a": fm.Expert({}, 1.0, 0.01, "tensor", "number", "bf16")})
        fm.RoutedModel(layer, bank, router=lambda f: torch.ones(len(f), 1), features=lambda x: router(x))(x)

    def module(x: Any) -> None:
        changed = copy.copy(layer)
        changed._parameters = {"weight": x}
        fm.merge(changed, [{"weight": plain}])

    return {
        "filter_": lambda x: fm.filter_(x, fm.HighPass(0.4)),
        "filter_ of a list": lambda x: fm.filter_([torch.zeros(3), x], fm.HighPass(0.4)),
        "filter_ by torch": lambda x: fm.filter_(x, fm.HighPass(0.4), backend="torch"),
        "filtered": lambda x: fm.filtered(x, fm.HighPass(0.4)),
        "merge, base": lambda x: fm.merge({"w": x}, [{"w": plain}]),
        "merge, model": lambda x: fm.merge({"w": plain}, [{"w": x}]),
        "merge, module": module,
        "merge_tensors, base": lambda x: fm.merge_tensors(x, [plain]),
        "merge_tensors, model": lambda x: fm.merge_tensors(plain, [plain, x], method="ties"),
        "extract_experts": lambda x: fm.extract_experts({"w": plain}, {"task": {"w": x}}),
        "extract_experts, base": lambda x: fm.extract_experts({"w": x}, {"task": {"w": plain}}),
        "ExpertBank": switched,
        "Router": router,
        "RoutedModel": routed,
    }


def outcomes(tensors: dict[str, Callable[[], Any]]) -> Iterator[tuple[str, str, str]]:
    for name, make in tensors.items():
        for called, function in functions().items():
            if name in NUMPY and called == "merge, module":  # torch lets no module have such a parameter
                continue
            try:
                function(make())
            except fm.FreemergeError as error:
                yield name, called, f"refused: {error}"
            except Exception as error:  # what it must not be
                yield name, called, f"{type(error).__name__}: {error}"
            else:
                yield name, called, "done"


def transformed() -> Iterator[tuple[str, str, str]]:
    """Plain tensors within torch.func transforms."""
    for called, function in functions().items():
        for name, transform in (("vmap", torch.func.vmap), ("grad", torch.func.grad)):
            found = []

            def inside(x: Tensor, function: Any = function, found: list[str] = found) -> Tensor:
                try:
                    function(x)
                    found.append("done")
                except fm.FreemergeError as error:
                    found.append(f"refused: {error}")
                except Exception as error:
                    found.append(f"{type(error).__name__}: {error}")
                return x.sum()

            transform(inside)(torch.randn(2, *SHAPE) if name == "vmap" else torch.randn(SHAPE))
            yield name, called, found[0]


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    for kind, found in (("foreign", outcomes(foreign())), ("foreign", transformed()), ("welcome", outcomes(welcome()))):
        for name, called, outcome in found:
            print(json.dumps([kind, name, called, outcome]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
