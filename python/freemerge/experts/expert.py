"""A light expert: the few entries of a task vector that the merged backbone misses most."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import ArgumentError, CheckpointError
from .format import read_file, write_file
from .values import ExpertTensor


@dataclass(frozen=True, eq=False)
class Expert:
    """e_i = mu_i * M(v_i, d), arXiv 2411.16815, section 4.2.

    Attributes:
        tensors: the kept entries of each tensor; one without entries is left out.
        mu: the factor that makes up for the entries that were dropped.
        density: d.
        scope: "tensor", "row" or "model": among which entries the largest were chosen.
        rescale: the rule that chose mu.
        values: how the values are rounded, a name of :data:`freemerge.experts.values.CODINGS`.
    """

    tensors: Mapping[str, ExpertTensor]
    mu: float
    density: float
    scope: str
    rescale: str
    values: str

    @property
    def entries(self) -> int:
        """Number of kept entries."""
        return sum(tensor.entries for tensor in self.tensors.values())

    def dense(self) -> dict[str, torch.Tensor]:
        """mu * M as dense float32 tensors, for tensors that hold entries."""
        return {name: self.mu * tensor.dense() for name, tensor in self.tensors.items()}

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> int:
        """Write an expert file (docs/expert-format.md) and return its size in bytes.

        The file appears at once when it is complete. Raises RefusedError if ``path`` exists, unless ``force``.
        """
        metadata = {
            "density": repr(self.density),
            "mu": repr(self.mu),
            "rescale": self.rescale,
            "scope": self.scope,
            "values": self.values,
        }
        return write_file(path, self.tensors, metadata, force=force)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Expert:
        """Read an expert file. Raises CheckpointError naming file and tensor if anything in it is wrong."""
        tensors, metadata = read_file(path)
        try:
            mu, density = float(metadata["mu"]), float(metadata["density"])
            rescale, scope, values = metadata["rescale"], metadata["scope"], metadata["values"]
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: bad expert metadata: {error}") from None
        if not math.isfinite(mu) or not 0 < density < 1:
            raise CheckpointError(f"{path}: bad expert metadata: mu={mu}, density={density}")
        return Expert(tensors, mu, density, scope, rescale, values)


def check_task_name(name: str) -> str:
    """``name`` itself; ArgumentError if it cannot be the name of a file."""
    if not isinstance(name, str) or not name or name.startswith(".") or any(c in name for c in "/\\\0"):
        raise ArgumentError(f"models: {name!r} cannot name a task: it must be usable as a file name")
    return name
