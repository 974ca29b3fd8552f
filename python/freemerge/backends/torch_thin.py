"""The torch backend's thin form: cosines and sines as dense products, without an FFT.

The cosine and sine of a frequency pair (k, -k) span an invariant space of every filter with M(k, l) = M(k, -l), so in
the products of both axes' bases such a filter is one gain per entry: y = background * x + B_y' (G * (B_y x B_x')) B_x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..planner.forms import compute_dtype, thin_bins, thin_is_flat
from ..planner.plan import Decimation, Plan
from .memory import matrices
from .torch_products import faithful_products

_BLOCK_ELEMENTS = 1 << 19  # of matrices taken together


@dataclass(frozen=True)
class _Tables:
    basis_y: torch.Tensor  #: (r, H)
    basis_x: torch.Tensor  #: (q, W)
    gain: torch.Tensor  #: (r, q), with the background taken off
    transposed_y: torch.Tensor
    transposed_x: torch.Tensor
    #: Both axes' bases in one: (HW, rq) with the gains, in float64 as its sums are long, and (rq, HW).
    flat: tuple[torch.Tensor, torch.Tensor] | None


def thin_tables(plan: Plan) -> _Tables:
    assert plan.rows is not None
    assert plan.columns is not None
    height, width = plan.matrix
    (bins_y, basis_y), (bins_x, basis_x) = _basis(height, plan.rows), _basis(width, plan.columns)
    gain = plan.response.gain(bins_y[:, None], bins_x[None, :], plan.shape) - plan.background
    gain = np.broadcast_to(gain, (bins_y.size, bins_x.size))
    dtype = compute_dtype(plan.dtype)

    def tensor(a: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.ascontiguousarray(a), dtype=dtype, device=plan.device)

    flat = None
    if thin_is_flat(plan.matrix, plan.rows, plan.columns):
        both = np.kron(basis_y, basis_x)
        down = torch.tensor(np.ascontiguousarray((both * gain.reshape(-1, 1)).T), device=plan.device)
        flat = down, tensor(both)
    return _Tables(tensor(basis_y), tensor(basis_x), tensor(gain), tensor(basis_y.T), tensor(basis_x.T), flat)


def _basis(n: int, d: Decimation) -> tuple[np.ndarray, np.ndarray]:
    """The bin of each basis vector, and the orthonormal vectors as rows."""
    bins = thin_bins(n, d)
    paired = bins[(bins > 0) & (2 * bins != n)]
    samples = np.arange(n, dtype=np.int64)

    def angle(k: np.ndarray) -> np.ndarray:
        # The product is reduced as an integer: no rounding, however long the axis.
        return 2 * math.pi / n * (k.astype(np.int64)[:, None] * samples % n)

    scale = np.where(np.isin(bins, paired), math.sqrt(2 / n), math.sqrt(1 / n))
    vectors = np.concatenate([np.cos(angle(bins)) * scale[:, None], np.sin(angle(paired)) * math.sqrt(2 / n)])
    return np.concatenate([bins, paired]), vectors


@faithful_products
def run_thin(plan: Plan, tables: _Tables, batches: Sequence[torch.Tensor], scale: float) -> None:
    keep = plan.background * scale
    for batch in batches:
        if plan.dtype != tables.gain.dtype:
            for x in matrices((batch,)):
                converted = x.to(tables.gain.dtype)
                _filter(converted, tables, keep, scale)
                x.copy_(converted)
        elif tables.flat is not None and batch.is_contiguous():
            size, (down, up) = math.prod(plan.matrix), tables.flat
            for rows in torch.split(batch.view(-1, size), max(1, _BLOCK_ELEMENTS // size)):
                spectrum = torch.mm(rows.double(), down).to(rows.dtype)
                rows.addmm_(spectrum, up, beta=keep, alpha=scale)
        elif batch.ndim > 2 and batch.is_contiguous():
            group = max(1, _BLOCK_ELEMENTS // math.prod(plan.matrix))
            for start in range(0, batch.shape[0], group):
                _filter_batch(batch[start : start + group], tables, keep, scale)
        else:
            for x in matrices((batch,)):
                _filter(x, tables, keep, scale)


def _filter(x: torch.Tensor, t: _Tables, keep: float, scale: float) -> None:
    spectrum = torch.mm(t.basis_y, torch.mm(x, t.transposed_x)).mul_(t.gain)
    x.addmm_(torch.mm(t.transposed_y, spectrum), t.basis_x, beta=keep, alpha=scale)


def _filter_batch(x: torch.Tensor, t: _Tables, keep: float, scale: float) -> None:
    """The same for adjacent matrices, in as few products."""
    (count, height, width), (r, q) = x.shape, t.gain.shape
    rows = x.view(count * height, width)
    lines = torch.mm(rows, t.transposed_x).view(count, height, q)
    spectrum = torch.bmm(t.basis_y.expand(count, r, height), lines).mul_(t.gain)
    lines = torch.bmm(t.transposed_y.expand(count, height, r), spectrum)
    torch.addmm(rows, lines.view(count * height, q), t.basis_x, beta=keep, alpha=scale, out=rows)
