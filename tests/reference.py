"""Merges by the paper and the released scripts, plain and in float64: no linearity, complex FFTs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freemerge.merging.recipe import Recipe
from freemerge.merging.units import Unit
from freemerge.responses import Response


def reference_filter(matrix: Tensor, response: Response) -> Tensor:
    """Re(ifft2(M * fft2(x))) of the last two axes (or the only one), float64."""
    shape = tuple(matrix.shape[-2:])
    mask = torch.from_numpy(response.mask(shape)).to(matrix.device)
    wide = matrix.double() if matrix.ndim > 1 else matrix.double()[None]
    return torch.fft.ifft2(mask * torch.fft.fft2(wide)).real.reshape(matrix.shape)


def reference_merge(
    base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], recipe: Recipe, units: Sequence[Unit]
) -> dict[str, Tensor]:
    """theta_0 + scale * sum_i lambda_i G_i for every tensor of the given units, float64, unrounded."""
    raw = [{name: model[name].double() - base[name].double() for u in units for name in u.names} for model in models]
    filtered = [dict(vectors) for vectors in raw]
    for unit in units:
        if unit.action == "filter":
            for vectors in filtered:
                _filter_unit(unit, vectors, recipe.response)
    merged = [unit for unit in units if unit.action != "copy"]
    names = [name for unit in merged for name in unit.names]

    def mean(vectors: Mapping[str, Tensor], *names: str) -> float:
        return float(torch.cat([vectors[name].flatten() for name in names]).abs().mean())

    def weights(name: str) -> list[float]:
        if recipe.weights == "sum":
            return [1.0] * len(models)
        if recipe.weights == "uniform":
            return [1 / len(models)] * len(models)
        if recipe.weights != "magnitude":
            return list(recipe.weights)
        if recipe.scope == "tensor":
            unit = next(unit for unit in merged if name in unit.names)
            energies = [mean(v, *unit.names) for v in (raw if recipe.stats == "raw" else filtered)]
        elif recipe.stats == "raw":
            energies = [mean(v, *names) for v in raw]
        else:
            energies = [sum(mean(v, n) for n in names) / len(names) for v in filtered]
        return [e / sum(energies) for e in energies]

    scale = recipe.scale
    if scale == "auto":
        scale = 0.4 * (len(models) if recipe.weights in ("magnitude", "uniform") else 1)

    out = {name: base[name].double() for unit in units for name in unit.names}
    for unit in merged:
        sums, unfiltered = {}, {}
        for name in unit.names:
            lambdas = weights(name)
            terms = [w * v[name] for w, v in zip(lambdas, filtered, strict=True)]
            if recipe.align:
                means = [mean(v, *unit.names) for v in filtered]
                terms = [t * (max(means) / m if m else 0.0) for t, m in zip(terms, means, strict=True)]
            if recipe.sign_election:
                elected = torch.sign(sum(terms))
                terms = [torch.where(torch.sign(t) == elected, t, 0.0) for t in terms]
            sums[name] = sum(terms)
            unfiltered[name] = sum(w * v[name] for w, v in zip(lambdas, raw, strict=True))
        factor = 1.0
        if recipe.renormalize and unit.action == "filter":
            before = sum(float((t**2).sum()) for t in unfiltered.values()) ** 0.5
            after = sum(float((t**2).sum()) for t in sums.values()) ** 0.5
            factor = before / after if after > 1e-6 * before else 1.0
        for name in unit.names:
            out[name] = out[name] + scale * factor * sums[name]
    return out


def _filter_unit(unit: Unit, vectors: dict[str, Tensor], response: Response) -> None:
    stacked = torch.cat([vectors[name] for name in unit.names]) if len(unit.names) > 1 else vectors[unit.names[0]]
    blocks = stacked.split(list(unit.parts)) if unit.parts else [stacked]
    result = torch.cat([reference_filter(block, response) for block in blocks])
    for name, rows in zip(unit.names, result.split([len(vectors[name]) for name in unit.names]), strict=True):
        vectors[name] = rows
