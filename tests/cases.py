"""The one list of shapes, dtypes and responses for the tests of every backend."""

from __future__ import annotations

import numpy as np
import torch

import freemerge as fm

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Small enough for the oracle: tiny, odd, prime, 1 x N, N x 1, rectangles, vectors, batches.
SHAPES: tuple[tuple[int, ...], ...] = (
    (1, 1),
    (1, 2),
    (2, 1),
    (2, 2),
    (3, 5),
    (1, 17),
    (17, 1),
    (4, 64),
    (64, 4),
    (13, 13),
    (31, 37),
    (51, 33),
    (48, 96),
    (96, 48),
    (101, 257),
    (211, 131),
    (128, 192),
    (256, 256),
    (1, 768),
    (768, 1),
    (1,),
    (2,),
    (97,),
    (600,),
    (3, 20, 30),
    (2, 2, 9, 16),
)


class Skewed:
    """Gains that tell k from -k in one axis; the repr, unlike a function's, is the same in every worker of a run."""

    def __call__(self, ky: np.ndarray, kx: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        return 1.0 / (1.0 + 0.1 * np.abs(ky - 2 * kx))

    def __repr__(self) -> str:
        return "skewed"


RESPONSES: tuple[fm.Response, ...] = (
    fm.HighPass(0.0),
    fm.HighPass(0.02),
    fm.HighPass(0.1),
    fm.HighPass(0.4),
    fm.HighPass(9.0),
    fm.HighPass(3, unit="bins"),
    fm.HighPass(0.15, metric="normalized"),
    fm.LowPass(0.1),
    fm.BandPass(0.05, 0.3),
    fm.BandStop(0.02, 0.08),
    fm.Butterworth(0.2, 2),
    fm.Butterworth(0.02, 4),
    fm.Gaussian(0.03),
    fm.Gaussian(0.3),
    fm.BandGain(0.1, 0.5, 1.5),
    fm.Center(-1),
    fm.Official(0.7),
    fm.Official(0.3),
    fm.Official(0.6, relative_to="max"),
    fm.Custom(Skewed()),
)
