"""Frequency gains on the latents of a diffusion model, in place, as FreSca does on the guidance term.

Classifier-free guidance adds a multiple of the difference between two predictions. Here its low and high frequencies
have gains of their own. A small network stands for the denoiser; a real one is called in the same way.

    python examples/latents.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import freemerge as fm

LOW, HIGH, CUTOFF = 1.0, 1.3, 0.2  # gains below and above the cutoff, a fraction of the shorter side
GUIDANCE, STEPS = 4.0, 8


def guided(conditional: Tensor, unconditional: Tensor, response: fm.Response) -> Tensor:
    """A guided prediction; the last two dimensions are rows and columns, those before them a batch."""
    difference = conditional - unconditional
    fm.filter_(difference, response)
    return unconditional + GUIDANCE * difference


def sample(denoise: nn.Module, response: fm.Response, size: int = 32) -> Tensor:
    """Latents [1, 4, size, size] after some steps of a sampler; the condition is as large."""
    latents, condition = torch.randn(2, 1, 4, size, size, generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        conditional = denoise(torch.cat([latents, condition], 1))
        unconditional = denoise(torch.cat([latents, torch.zeros_like(condition)], 1))
        latents = latents - guided(conditional, unconditional, response) / STEPS
    return latents


def roughness(latents: Tensor) -> float:
    """Share of the energy at and above the cutoff."""
    high = fm.filtered(latents, fm.HighPass(CUTOFF))
    return float(high.square().sum() / latents.square().sum())


if __name__ == "__main__":
    torch.manual_seed(0)
    denoise = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 4, 3, padding=1))
    with torch.no_grad():
        plain = sample(denoise, fm.BandGain(CUTOFF, 1.0, 1.0))
        sharper = sample(denoise, fm.BandGain(CUTOFF, LOW, HIGH))
    print(f"energy in high frequencies: {roughness(plain):.1%} plain, {roughness(sharper):.1%} with a gain of {HIGH}")
