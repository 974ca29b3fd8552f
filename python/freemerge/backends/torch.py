"""The pure-torch backend: every form, any device, in blocks of rows and panels of columns.

It allocates one set of block buffers per call and reads or writes the matrices in place. Products and transforms write
into those buffers (``out=``), which saves page faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from ..cache import table_bytes
from ..planner.costs import Costs, Traits
from ..planner.plan import Form, Plan
from .base import BackendInfo, Executable
from .torch_columns import SMALL_ELEMENTS, kept_columns, run_blocks, run_small, run_vectors, small_gains, vector_gains
from .torch_decimated import decimated_tables, run_decimated
from .torch_products import exact_products
from .torch_thin import run_thin, thin_tables
from .torch_vectors import TorchVectors

Tables = TypeVar("Tables")

# Measured on one core of a Sapphire Rapids Xeon with MKL, ns; benchmarks/test_filter.py shows the outcome.
_CPU_COSTS = Costs(move=0.25, tap=0.04, dense=0.02, row_fft=0.18, column_fft=0.45, coarse_fft=0.2, call=6000.0)
_OTHER_COSTS = Costs(move=0.005, tap=0.0004, dense=0.0001, row_fft=0.001, column_fft=0.003, coarse_fft=0.002, call=2e4)

_FORMS: frozenset[Form] = frozenset(("identity", "scale", "decimated", "thin", "pruned", "full"))
_EXACT: frozenset[Form] = frozenset(("identity", "scale", "pruned", "full"))
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


class TorchBackend(TorchVectors):
    """Reference for speed on a machine without native kernels; the float64 oracle of the tests is its own reference."""

    name = "torch"
    preference = 2

    def info(self) -> BackendInfo:
        return BackendInfo(self.name, True, details={"torch": torch.__version__})

    def takes(self, tensors: Sequence[torch.Tensor]) -> str | None:
        return None

    def traits(self, device: torch.device) -> Traits:
        # A lowered matmul precision (TF32, bf16) would break the error bound of every form made of products.
        exact = exact_products()
        cpu = device.type == "cpu"
        return Traits(
            forms=_FORMS if exact else _EXACT,
            dtypes=_DTYPES,
            costs=_CPU_COSTS if cpu else _OTHER_COSTS,
            taps=tuple(range(6, 21)),
            dense=exact,
            extra_taps=8 if cpu else 64,
            packs=16 << 20,  # a smaller spectrum is faster in memory of its own
        )

    def supports(self, plan: Plan) -> str | None:
        if plan.dtype not in _DTYPES:
            return f"has no arithmetic for {plan.dtype}"
        return "has no transposed forms" if plan.transposed else None

    def prepare(self, plan: Plan) -> Executable:
        if plan.form == "decimated":
            return _Filter(plan, decimated_tables(plan), run_decimated)
        if plan.form == "thin":
            return _Filter(plan, thin_tables(plan), run_thin)
        if plan.form == "full" and plan.matrix[0] == 1:
            return _Filter(plan, vector_gains(plan), run_vectors)
        if plan.form == "full" and not plan.packed and math.prod(plan.matrix) <= SMALL_ELEMENTS:
            return _Filter(plan, small_gains(plan), run_small)
        return _Filter(plan, kept_columns(plan), run_blocks)


class _Filter(Executable, Generic[Tables]):
    """The tables of a plan and the function that runs it."""

    def __init__(
        self, plan: Plan, tables: Tables, run: Callable[[Plan, Tables, Sequence[torch.Tensor], float], None]
    ) -> None:
        self._plan, self._tables, self._run = plan, tables, run
        self.nbytes = table_bytes(tables)

    def run(self, batches: Sequence[torch.Tensor], scale: float) -> None:
        self._run(self._plan, self._tables, batches, scale)
