"""The filter without an FFT: direct DFT matrices in float64. Slow, and as plain as the definition."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def dft_matrix(n: int) -> npt.NDArray[np.complex128]:
    """F with F[k, j] = exp(-2 pi i k j / n); k j is reduced modulo n, so that the angle is exact."""
    k = np.arange(n)
    return np.exp(-2j * np.pi * (np.outer(k, k) % n) / n)


def oracle_filter(x: Array, mask: Array) -> Array:
    """Re(F^-1 (M * F x)) of an H x W matrix with the H x W mask M in stored order."""
    height, width = x.shape
    rows, columns = dft_matrix(height), dft_matrix(width)
    spectrum = rows @ x @ columns.T
    return (rows.conj() @ (mask * spectrum) @ columns.conj().T).real / (height * width)
