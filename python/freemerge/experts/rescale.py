"""mu_i, the factor of an expert's entries, of the whole model or of each tensor. One function a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..arguments import finite_number
from ..errors import ArgumentError, did_you_mean


@dataclass(frozen=True)
class TensorStatistics:
    """Sums over one tensor, in float64. v: the task vector; M: its kept entries before rounding."""

    entries: int
    magnitude: float  #: sum |v|
    kept_entries: int
    kept_magnitude: float  #: sum |M|
    shortfall: float = 0.0  #: ||v||^2 - <theta_m - theta_0, v>, for rules that need the backbone theta_m
    kept_product: float = 0.0  #: <M as it is stored, v>, for the same rules
    kept_square: float = 0.0  #: ||M as it is stored||^2, for the same rules
    vector: bool = False  #: whether the tensor has one dimension
    base_norm: float = 0.0  #: ||theta_0||, for rules that need norms: spectral, of a vector Frobenius
    kept_norm: float = 0.0  #: ||M||, for the same rules and of the same kind


@dataclass(frozen=True)
class Statistics:
    """What the rules know about model i: sums of every tensor, d, and computed on demand E(v_j) of all models and, of
    the backbone theta_m, <M as it is stored, theta_m - theta_0>."""

    tensors: Sequence[TensorStatistics]
    density: float
    model_means: Callable[[], Sequence[float]]
    backbone_product: Callable[[], float]

    @property
    def entries(self) -> int:
        """Number of entries of v_i."""
        return sum(tensor.entries for tensor in self.tensors)

    @property
    def mean(self) -> float:
        """E(v_i)."""
        return math.fsum(tensor.magnitude for tensor in self.tensors) / self.entries

    @property
    def kept_entries(self) -> int:
        """Number of entries of M."""
        return sum(tensor.kept_entries for tensor in self.tensors)

    @property
    def kept_magnitude(self) -> float:
        """sum |M|."""
        return math.fsum(tensor.kept_magnitude for tensor in self.tensors)


Factors = float | Sequence[float]  # mu of the whole model, or of each tensor
Function = TypeVar("Function", bound=Callable[[Statistics], Factors])


@dataclass(frozen=True)
class Rule:
    """A rule for mu. It is not called if nothing is kept."""

    mu: Callable[[Statistics], Factors]
    needs_backbone: bool
    needs_norms: bool


RULES: dict[str, Rule] = {}
"""All rules by name."""


def rule(*, needs_backbone: bool = False, needs_norms: bool = False) -> Callable[[Function], Function]:
    """Add a rule under the name of its function."""

    def add(function: Function) -> Function:
        RULES[function.__name__] = Rule(function, needs_backbone, needs_norms)
        return function

    return add


TRUST = 0.15  #: how much an expert may add to a tensor without further reason, relative to the pretrained weights


@rule(needs_norms=True)
def auto(s: Statistics) -> list[float]:
    """``min(released, max(1, TRUST ||theta_0|| / ||M||))`` of each tensor, and of all vectors together.

    The released mu makes up for all that was dropped, which is right where it is small against the pretrained weights.
    In small networks it is as large as they are; there the entries are added as they are, or a little stronger.
    """
    ceiling = released(s)
    bases, kepts = ([getattr(t, name) ** 2 for t in s.tensors if t.vector] for name in ("base_norm", "kept_norm"))
    of_vectors = math.sqrt(math.fsum(bases)), math.sqrt(math.fsum(kepts))
    norms = [of_vectors if tensor.vector else (tensor.base_norm, tensor.kept_norm) for tensor in s.tensors]
    return [min(ceiling, max(1.0, TRUST * base / kept)) if kept else ceiling for base, kept in norms]


@rule()
def released(s: Statistics) -> float:
    """``-mean|M| over kept entries * log10(d) / E(v_i)``, as in the released code."""
    return -s.kept_magnitude / s.kept_entries * math.log10(s.density) / s.mean


@rule()
def paper(s: Statistics) -> float:
    """``-E(M) over all entries * ln(d) / (lambda_i E(v_i))``, lambda_i = E(v_i) / sum_j E(v_j)."""
    share = s.mean / math.fsum(s.model_means())
    return -s.kept_magnitude / s.entries * math.log(s.density) / (share * s.mean)


@rule(needs_backbone=True)
def projection(s: Statistics) -> float:
    """The mu for which ``<theta_m + mu M - theta_0, v_i> = ||v_i||^2``, with M as it is stored."""
    product = math.fsum(tensor.kept_product for tensor in s.tensors)
    return math.fsum(tensor.shortfall for tensor in s.tensors) / product if product else 0.0


@rule(needs_backbone=True)
def least_squares(s: Statistics) -> float:
    """``max(0, <M, R> / <M, M>)``, R = theta_i - theta_m and M as it is stored: mu M is as near to R as it can be."""
    square = math.fsum(tensor.kept_square for tensor in s.tensors)
    product = math.fsum(tensor.kept_product for tensor in s.tensors) - s.backbone_product()
    return max(0.0, product / square) if square else 0.0


def check_rescale(rescale: str | float, *, backbone: bool) -> None:
    """ArgumentError for what is neither a rule nor a finite number, and for a backbone missing or not needed."""
    known = rescale in RULES if isinstance(rescale, str) else finite_number(rescale) is not None
    if not known:
        hint = did_you_mean(rescale, RULES, listed=True)
        raise ArgumentError(f"rescale must be one of {', '.join(RULES)} or a finite number, got {rescale!r}{hint}")
    needing = [name for name, rule in RULES.items() if rule.needs_backbone]
    if backbone != (isinstance(rescale, str) and rescale in needing):
        names = " or ".join(map(repr, needing))
        raise ArgumentError(f"backbone must be given for rescale={names}, and for that only")


def factors_of(rescale: str | float, statistics: Statistics) -> tuple[float, list[float]]:
    """mu by the rule of this name, or ``rescale`` itself if it is a number, and the share of it for each tensor.

    mu is the largest of all tensors, 0 if nothing is kept; shares are 1 where there is one mu for all.
    """
    count = len(statistics.tensors)
    if not isinstance(rescale, str):
        return float(rescale), [1.0] * count
    factors = RULES[rescale].mu(statistics) if statistics.kept_magnitude else 0.0
    if isinstance(factors, float):
        return factors, [1.0] * count
    mu = max(factor for factor, tensor in zip(factors, statistics.tensors, strict=True) if tensor.kept_entries)
    return mu, [factor / mu for factor in factors]
