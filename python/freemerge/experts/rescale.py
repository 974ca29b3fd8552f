"""mu_i, the factor of an expert's entries. One function a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ArgumentError


@dataclass(frozen=True)
class TensorStatistics:
    """Sums over one tensor, in float64. v: the task vector; M: its kept entries before rounding."""

    entries: int
    magnitude: float  #: sum |v|
    kept_entries: int
    kept_magnitude: float  #: sum |M|
    shortfall: float = 0.0  #: ||v||^2 - <theta_m - theta_0, v>, for rules that need the backbone theta_m
    kept_product: float = 0.0  #: <M as it is stored, v>, for the same rules


@dataclass(frozen=True)
class Statistics:
    """What the rules know about model i: sums of every tensor, d, and E(v_j) of all models, computed on demand."""

    tensors: Sequence[TensorStatistics]
    density: float
    model_means: Callable[[], Sequence[float]]

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


@dataclass(frozen=True)
class Rule:
    """A rule for mu. It is not called if nothing is kept."""

    mu: Callable[[Statistics], float]
    needs_backbone: bool


RULES: dict[str, Rule] = {}
"""All rules by name."""


def rule(*, needs_backbone: bool = False) -> Callable[[Callable[[Statistics], float]], Callable[[Statistics], float]]:
    """Add a rule under the name of its function."""

    def add(function: Callable[[Statistics], float]) -> Callable[[Statistics], float]:
        RULES[function.__name__] = Rule(function, needs_backbone)
        return function

    return add


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


def check_rescale(rescale: str | float, *, backbone: bool) -> None:
    """ArgumentError for what is neither a rule nor a finite number, and for a backbone missing or not needed."""
    if rescale not in RULES and (isinstance(rescale, str) or not math.isfinite(rescale)):
        raise ArgumentError(f"rescale must be one of {', '.join(RULES)} or a finite number, got {rescale!r}")
    needing = [name for name, rule in RULES.items() if rule.needs_backbone]
    if backbone != (rescale in needing):
        names = " or ".join(map(repr, needing))
        raise ArgumentError(f"backbone must be given for rescale={names}, and for that only")


def mu_of(rescale: str | float, statistics: Statistics) -> float:
    """The factor by the rule of this name, 0 if nothing is kept; or ``rescale`` itself if it is a number."""
    if not isinstance(rescale, str):
        return float(rescale)
    return RULES[rescale].mu(statistics) if statistics.kept_magnitude else 0.0
