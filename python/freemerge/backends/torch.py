"""The torch backend: the reference and the fallback, on any device, in torch and NumPy operations alone.

The form full is the plain formula, rfft2, gains, irfft2. A GPU without native kernels also has the form decimated, by
matrix products (:mod:`.torch_decimated`). "auto" chooses this backend on a CPU for single rows and for float64 masks
without closed form, and on other devices for what no native backend takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch

from ..planner.costs import Costs, Traits
from ..planner.forms import compute_dtype
from ..planner.plan import Form, Plan
from .base import BackendInfo, Executable
from .torch_decimated import Decimated, decimated_bytes, dominant_means
from .torch_vectors import TorchVectors

# Where products and launches are those of a GPU; nothing else has to be compared.
_COSTS = Costs(
    move=0.005, tap=0.0009, row_fft=0.001, column_fft=0.003, coarse_fft=0.002, call=300.0, start=40_000.0,
)  # fmt: skip
_CENTERED = frozenset((torch.float32, torch.float64))  # 16-bit storage is rounded more coarsely than the filter rounds
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_FORMS: frozenset[Form] = frozenset(("identity", "scale", "mean", "full"))
_PRODUCTS: frozenset[Form] = frozenset(("decimated",))
_NUMPY_OUT = int(np.__version__.partition(".")[0]) >= 2  # its FFTs can write into given memory
_SUMMED = 1 << 15  # entries, which torch adds up on one thread
_BATCH_ELEMENTS = 1 << 18  # of the matrices that are transformed together, if there are several


class TorchBackend(TorchVectors):
    """Reference for speed on a machine without native kernels; the float64 oracle of the tests is its own reference."""

    name = "torch"
    preference = 2

    def info(self) -> BackendInfo:
        return BackendInfo(self.name, True, details={"torch": torch.__version__})

    def takes(self, tensors: Sequence[torch.Tensor]) -> str | None:
        return None

    def traits(self, device: torch.device) -> Traits:
        # A lowered matmul precision (TF32, bf16) would break the error bound of products.
        return _traits(products=exact_products()) if device.type != "cpu" else _traits(products=False, library="numpy")

    def supports(self, plan: Plan) -> str | None:
        return None if plan.dtype in _DTYPES else f"has no arithmetic for {plan.dtype}"

    def prepare(self, plan: Plan) -> Executable:
        if plan.form == "decimated":
            return Decimated(plan)
        if plan.form == "mean":
            return _Mean(plan)
        return _NumpyRows(plan) if plan.library == "numpy" else _Full(plan)


@cache
def _traits(*, products: bool, library: str = "") -> Traits:
    return Traits(
        forms=_FORMS | _PRODUCTS if products else _FORMS,
        dtypes=_DTYPES,
        costs=_COSTS,
        taps=tuple(range(6, 21)),
        oversamplings=(2.0, 2.5, 3.0, 4.0),
        whole_columns=products,
        half_bins=int(products),
        longest_sum=128,
        chirp_stages=5.0,  # measured with MKL
        centers=dict.fromkeys(("decimated", "full"), _CENTERED),
        row_library=library,
        vary=not library,
        workspace=_workspace,
    )


def exact_products() -> bool:
    """Whether products of float32 matrices are computed in float32, as far as torch can tell."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch's newer interface, for some operation or device
        return False


class _Full(Executable):
    """Transforms of whole matrices, as many at a time as are small enough together."""

    def __init__(self, plan: Plan) -> None:
        self._shape, self._dtype = plan.matrix, compute_dtype(plan.dtype)
        gains = plan.response.half_mask(plan.shape)
        # Complex, as a product of complex tensors is faster.
        self._gains = torch.tensor(gains, dtype=self._dtype.to_complex(), device=plan.device)
        self._centers, self._at_zero = plan.centers, float(gains[0, 0])
        self.nbytes = self._gains.nbytes

    def run(self, batches: Sequence[torch.Tensor], scale: float) -> None:
        for x in _parts(batches):
            y = x.to(self._dtype)
            mean = dominant_means(y) if self._centers else None
            spectrum = torch.fft.rfft2(y if mean is None else y - mean).mul_(self._gains)
            y = torch.fft.irfft2(spectrum, s=self._shape)
            _write(x, y if mean is None else y.add_(mean, alpha=self._at_zero), scale)


class _NumpyRows(Executable):
    """Single rows, by NumPy, whose transforms cost less to set up and are faster at lengths that are no power of 2."""

    def __init__(self, plan: Plan) -> None:
        self._dtype = compute_dtype(plan.dtype)
        self._gains = plan.column_gains.astype(np.complex128 if self._dtype == torch.float64 else np.complex64)
        self.nbytes = self._gains.nbytes

    def run(self, batches: Sequence[torch.Tensor], scale: float) -> None:
        for x in _parts(batches):
            y = x if x.dtype == self._dtype else x.to(self._dtype)
            values = y.numpy()
            spectrum = np.fft.rfft(values)
            np.multiply(spectrum, self._gains, out=spectrum)
            if _NUMPY_OUT:
                np.fft.irfft(spectrum, values.shape[-1], out=values)
            else:
                values[...] = np.fft.irfft(spectrum, values.shape[-1])
            if y is not x or scale != 1.0:
                _write(x, y, scale)


class _Mean(Executable):
    """Single rows: y = background * x + (M(0) - background) * mean(x), whose sums are float64."""

    def __init__(self, plan: Plan) -> None:
        self._dtype, self._background = compute_dtype(plan.dtype), plan.background
        self._share = (float(plan.column_gains[0]) - plan.background) / plan.matrix[1]

    def run(self, batches: Sequence[torch.Tensor], scale: float) -> None:
        for x in batches:
            y = x if x.dtype == self._dtype else x.to(self._dtype)
            mean = _sums(y).mul_(self._share * scale).to(self._dtype)
            if self._background * scale != 1.0:
                y.mul_(self._background * scale)
            y.add_(mean)
            if y is not x:
                x.copy_(y)


def _sums(y: torch.Tensor) -> torch.Tensor:
    """The sum of each row in float64, by pieces: torch adds up a single long row by as many as it has threads."""
    *rows, length = y.shape
    count = length // _SUMMED
    pieces = y[..., : count * _SUMMED].reshape(*rows, count, _SUMMED).sum(-1, dtype=torch.float64)
    rest = y[..., count * _SUMMED :].sum(-1, keepdim=True, dtype=torch.float64)
    return pieces.sum(-1, keepdim=True).add_(rest)


def _write(x: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    """x = scale * y, rounded once; y is overwritten."""
    x.copy_(y if scale == 1.0 else y.mul_(scale))


def _parts(batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The batches in parts of at most _BATCH_ELEMENTS elements, or of one matrix."""
    for x in batches:
        if x.ndim == 2 or x.numel() <= _BATCH_ELEMENTS:
            yield x
        else:
            yield from torch.split(x, max(1, _BATCH_ELEMENTS // (x.shape[-2] * x.shape[-1])))


def _workspace(plan: Plan) -> int:
    if plan.form == "decimated":
        return decimated_bytes(plan)
    size = compute_dtype(plan.dtype).itemsize * math.prod(plan.matrix)
    return 2 * size if plan.form == "full" else 0
