"""The measures written down plainly, in float64 NumPy, and models to measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from freemerge.analysis.sums import EDGES
from oracle import dft_matrix

Array = npt.NDArray[np.float64]
State = dict[str, Tensor]


def models(shapes: dict[str, tuple[int, ...]], count: int, seed: int = 0) -> tuple[State, list[State]]:
    """A base and fine-tuned models whose task vectors share a part and have means."""
    generator = torch.Generator().manual_seed(seed)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: noise(shape) for name, shape in shapes.items()}
    shared = {name: noise(shape) + 0.3 for name, shape in shapes.items()}
    return base, [
        {name: tensor + 0.01 * (i + 1) * (noise(tensor.shape) + 0.5 * shared[name]) for name, tensor in base.items()}
        for i in range(count)
    ]


def task_vectors(base: State, tuned: Sequence[State], name: str) -> list[Array]:
    """theta_i - theta_0 in float32, as the package has them, then float64."""
    return [(model[name] - base[name]).double().numpy() for model in tuned]


def matrix(x: Array) -> Array:
    return x[None, :] if x.ndim == 1 else x


def spectrum(x: Array) -> npt.NDArray[np.complex128]:
    """The unitary transform of a matrix."""
    x = matrix(x)
    return dft_matrix(x.shape[0]) @ x @ dft_matrix(x.shape[1]).T / math.sqrt(x.size)


def band_masks(shape: tuple[int, ...]) -> list[npt.NDArray[np.bool_]]:
    """The bins of each band, on all H x W of them."""
    height, width = (1, *shape)[-2:]
    signed = [[k if k <= n // 2 else k - n for k in range(n)] for n in (height, width)]
    radius = np.array([[math.hypot(ky, kx) for kx in signed[1]] for ky in signed[0]]) / min(shape[-2:])
    near = 1e-12  # a radius on an edge belongs to the band above
    return [(radius >= low - near) & (radius < high - near) for low, high in pairwise(EDGES)]


def relative_energy(x: Array) -> list[float | None]:
    """Mean energy of the bins of each band, to the mean of all."""
    power = np.abs(spectrum(x)) ** 2
    return [float(power[mask].mean() / power.mean()) if mask.any() else None for mask in band_masks(x.shape)]


def band_cosine(x: Array, y: Array, mask: npt.NDArray[np.bool_]) -> float:
    a, b = spectrum(x)[mask], spectrum(y)[mask]
    return float((a.conj() * b).sum().real / (np.linalg.norm(a) * np.linalg.norm(b)))


def cosine(x: Array, y: Array) -> float:
    return float((x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y)))


def amplitude_variance(vectors: Sequence[Array]) -> list[float | None]:
    """Variance over tasks of |spectrum|, to the mean of its square, in each band."""
    amplitudes = np.array([np.abs(spectrum(x)) for x in vectors])
    variance, square = amplitudes.var(0), (amplitudes**2).mean(0)
    return [
        float(variance[mask].sum() / square[mask].sum()) if mask.any() else None
        for mask in band_masks(vectors[0].shape)
    ]


def pairs(count: int) -> list[tuple[int, int]]:
    return list(combinations(range(count), 2))
