"""The figures of the pages: `python docs/figures.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

import freemerge as fm

matplotlib.use("agg")
from matplotlib import pyplot

SHAPE = (96, 64)
RESPONSES = {
    "HighPass(0.4)": fm.HighPass(0.4),
    "Butterworth(0.2, 2)": fm.Butterworth(0.2, 2),
    "Gaussian(0.2)": fm.Gaussian(0.2),
    "Center(-1)": fm.Center(-1),
    "Official(0.7)": fm.Official(0.7),
}

figure, axes = pyplot.subplots(1, len(RESPONSES), figsize=(10, 3.2), sharey=True, layout="constrained")
for axis, (title, response) in zip(axes, RESPONSES.items(), strict=True):
    mask = np.fft.fftshift(response.mask(SHAPE))
    image = axis.imshow(mask, cmap="gray", vmin=0, vmax=1, extent=(-32, 32, -48, 48))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("frequency along a row", fontsize=8)
axes[0].set_ylabel("along a column", fontsize=8)
figure.colorbar(image, ax=axes, shrink=0.8, label="gain")
figure.savefig(Path(__file__).with_name("responses.png"), dpi=90)
