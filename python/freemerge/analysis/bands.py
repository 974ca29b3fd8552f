"""Two-dimensional spectra of task vectors, summed over bands of the radius that a filter cuts off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..responses import Response, matrix_shape, signed_frequencies
from ..responses.base import column_weights
from .sums import EDGES, BandSums

_BLOCK_BINS = 1 << 18  # of the spectra, that are in memory as float64


def band_sums(vectors: list[Tensor], tasks: int, responses: Sequence[Response | None]) -> BandSums:
    """Sums over the bins of each band. ``vectors`` is emptied on the way, so that a vector makes room for its spectrum.

    Args:
        vectors: task vectors of one tensor, then what methods make of them: [..., H, W] or [n], float32 or float64.
        tasks: how many of them are task vectors.
        responses: for each of the others the response that its method filters matrices with, if it does.
    """
    shape = tuple(vectors[0].shape)
    height, width = matrix_shape(shape)
    spectra = []
    while vectors:
        matrices = vectors.pop(0).reshape(-1, height, width)
        spectra.append(torch.fft.rfft2(matrices, norm="ortho"))
    total = BandSums.zeros(tasks, len(responses))
    for block, rows in _blocks(spectra):
        total += _block_sums(block, rows, shape[-2:], tasks, responses)
    energy = np.diagonal(total.gram, axis1=1, axis2=2).sum(0)
    total.white[:] = np.outer(total.bins / total.bins.sum(), energy)
    return total


def band_of(shape: tuple[int, ...], rows: slice = slice(None)) -> npt.NDArray[np.intp]:
    """The band of each bin of the half spectrum, [H, W // 2 + 1] or the given rows of it."""
    height, width = matrix_shape(shape)
    ky = signed_frequencies(height)[rows, None]
    kx = np.arange(width // 2 + 1, dtype=np.float64)[None, :]
    edges = np.array([round(edge * min(shape[-2:]), 9) for edge in EDGES])  # rounded as a filter's cutoff is
    return np.searchsorted(edges, np.sqrt(ky * ky + kx * kx), side="right") - 1


def _blocks(spectra: Sequence[Tensor]) -> Iterator[tuple[Tensor, slice]]:
    """Rows of all spectra of one matrix, [V, rows, W // 2 + 1, 2] in float64, with the slice that they are."""
    count, height, columns = spectra[0].shape
    step = max(1, _BLOCK_BINS // columns)
    for matrix in range(count):
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            yield torch.stack([torch.view_as_real(spectrum[matrix, rows]).double() for spectrum in spectra]), rows


def _block_sums(
    block: Tensor, rows: slice, shape: tuple[int, ...], tasks: int, responses: Sequence[Response | None]
) -> BandSums:
    height, width = matrix_shape(shape)
    vectors, count, *_ = block.shape
    weights = torch.from_numpy(column_weights(width)).to(block.device)
    block = block * weights.sqrt()[:, None]
    energy = block.square().sum(-1)
    variance = energy[:tasks].sqrt().var(0, unbiased=False)

    bands = torch.from_numpy(band_of(shape, rows)).to(block.device).flatten()
    order = torch.argsort(bands, stable=True)
    sizes = torch.bincount(bands, minlength=len(EDGES) - 1).tolist()
    sums = BandSums.zeros(tasks, len(responses))
    parts = torch.split(block.reshape(vectors, -1, 2)[:, order], sizes, 1)
    spread = torch.split(variance.flatten()[order], sizes)
    share = torch.split(weights.expand(count, -1).flatten()[order], sizes)
    for band, part in enumerate(parts):
        flat = part.flatten(1)
        sums.gram[band] = (flat @ flat.mT).cpu().numpy()
        sums.variance[band] = float(spread[band].sum())
        sums.bins[band] = float(share[band].sum())
    total = energy.sum((1, 2)).cpu().numpy()
    sums.means[:] = energy[:, :, 0].sum(1).cpu().numpy(), energy[:, 0].sum(1).cpu().numpy() * (rows.start == 0)
    sums.white_means[:] = total / width, total / height
    for method, response in enumerate(responses):
        if response is not None:
            power = torch.from_numpy(np.square(response.half_mask(shape, rows))).to(block.device)
            kept = [weights.expand(count, -1), energy[:tasks].mean(0), variance]
            sums.kept[method] = [float((power * values).sum()) for values in kept]
    return sums
