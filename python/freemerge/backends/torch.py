"""The pure-torch backend: every form, any device, in blocks of rows and panels of columns.

It allocates one set of block buffers per call and reads or writes the matrices in place. Products and transforms write
into those buffers (``out=``), which saves page faults.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..planner.costs import Costs, Traits
from ..planner.plan import Form, Plan
from .base import BackendInfo, multiply_
from .torch_columns import run_columns
from .torch_decimated import run_decimated
from .torch_products import Run, exact_products
from .torch_thin import run_thin

# Measured on one core of a Sapphire Rapids Xeon with MKL, ns; benchmarks/test_filter.py shows the outcome.
_CPU_COSTS = Costs(move=0.25, tap=0.04, dense=0.02, row_fft=0.18, column_fft=0.45, coarse_fft=0.2, call=6000.0)
_OTHER_COSTS = Costs(move=0.005, tap=0.0004, dense=0.0001, row_fft=0.001, column_fft=0.003, coarse_fft=0.002, call=2e4)

_FORMS: frozenset[Form] = frozenset(("identity", "scale", "decimated", "thin", "pruned", "full"))
_EXACT: frozenset[Form] = frozenset(("identity", "scale", "pruned", "full"))
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


class TorchBackend:
    """Reference for speed on a machine without native kernels; the float64 oracle of the tests is its own reference."""

    name = "torch"

    def info(self) -> BackendInfo:
        return BackendInfo(self.name, True, details={"torch": torch.__version__})

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

    def run(self, plan: Plan, batches: Sequence[torch.Tensor], scale: float) -> None:
        _RUN[plan.form](plan, batches, scale)


def _scale(plan: Plan, batches: Sequence[torch.Tensor], scale: float) -> None:
    multiply_(batches, scale * plan.background)


_RUN: dict[Form, Run] = {
    "identity": _scale,
    "scale": _scale,
    "decimated": run_decimated,
    "thin": run_thin,
    "pruned": run_columns,
    "full": run_columns,
}
