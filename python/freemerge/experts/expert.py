"""A light expert: a small file with what the merged backbone misses most of a fine-tuned model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..arguments import number, path_of
from ..checkpoint.staging import hidden
from ..errors import ArgumentError, CheckpointError
from .format import read_file, write_file
from .values import ExpertTensor

_LONGEST_NAME = 255  # bytes, of file systems


@dataclass(frozen=True, eq=False)
class Expert:
    """What is added to the merged model for one task: e_i = mu_i * M(v_i, d), arXiv 2411.16815, section 4.2; or, for
    each tensor, a matrix of low rank near theta_i - theta_m; or what changes theta_m - theta_0 for the task.

    Attributes:
        tensors: what is kept of each tensor; one of which nothing is kept is left out.
        mu: the factor that makes up for the entries that were dropped.
        density: d; None where not entries are kept.
        scope: "tensor", "row" or "model": among which entries the largest were chosen; None as before.
        rescale: the rule that chose mu. Where it chose one for each tensor ("auto"), ``mu`` is the largest, and the
            values of the other tensors are smaller than those of v_i.
        values: how the tensors are coded, one of the names that :func:`freemerge.extract_experts` takes.
        budget: the share of the fp16 model's bytes that was asked for, if one was.
        statistics: running means and variances of the task's model, bfloat16 vectors: they replace those of the merged
            model, by :attr:`share`.
    """

    tensors: Mapping[str, ExpertTensor]
    mu: float
    density: float | None
    scope: str | None
    rescale: str
    values: str
    budget: float | None = None
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(number(self.mu)):
            raise ArgumentError(f"mu must be a finite number, got {self.mu!r}")
        for name in ("density", "budget"):
            if getattr(self, name) is not None and not 0 < number(getattr(self, name)) < 1:
                raise ArgumentError(f"{name} must be a share between 0 and 1, got {getattr(self, name)!r}")
        for name in ("mu", "density", "budget"):  # as floats, which files read back
            if getattr(self, name) is not None:
                object.__setattr__(self, name, number(getattr(self, name)))

    @property
    def share(self) -> float:
        """How far running statistics go from the merged model's to the task's.

        Single entries leave the weights so near to the merged model's that they do best with a mixture.
        """
        return 1.0 if self.density is None else 0.75

    @property
    def entries(self) -> int:
        """How many numbers are kept."""
        kept = sum(tensor.entries for tensor in self.tensors.values())
        return kept + sum(tensor.numel() for tensor in self.statistics.values())

    def dense(self, vectors: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """What is added, as dense float32 tensors, for tensors of which anything is kept.

        Running statistics are not added, and so not among them.

        ``vectors``: theta_m - theta_0 of each of these tensors, which masks and gains need (ArgumentError without).
        """
        known = {} if vectors is None else vectors
        added = {}
        for name, tensor in self.tensors.items():
            if tensor.relative and name in known:
                shape = tuple(known[name].shape)
                if shape != tensor.shape:
                    raise ArgumentError(f"vectors: {name!r} has shape {shape}, the expert's has {tensor.shape}")
                dense = tensor.dense(None, tensor.seen(known[name])).float()
            else:
                dense = tensor.dense()
            added[name] = self.mu * dense
        return added

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> int:
        """Write an expert file (docs/expert-format.md) and return its size in bytes.

        The file appears at once when it is complete. Raises RefusedError if ``path`` exists, unless ``force``, and
        ArgumentError for statistics that are no finite bfloat16 vectors.
        """
        return write_file(path_of("path", path), self.tensors, self.statistics, self.metadata, force=force)

    @property
    def metadata(self) -> dict[str, str]:
        """What the header of the file says about the expert."""
        optional = {"budget": self.budget, "density": self.density}
        return {
            "version": "2" if self.density is None else "1",
            "mu": repr(self.mu),
            "rescale": self.rescale,
            "values": self.values,
            **({} if self.scope is None else {"scope": self.scope}),
            **{key: repr(value) for key, value in optional.items() if value is not None},
        }

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Expert:
        """Read an expert file. Raises CheckpointError naming file and tensor if anything in it is wrong."""
        tensors, statistics, metadata = read_file(path_of("path", path))
        try:
            mu, rescale, values = float(metadata["mu"]), metadata["rescale"], metadata["values"]
            of_entries = metadata["version"] == "1"
            density, scope = (float(metadata["density"]), metadata["scope"]) if of_entries else (None, None)
            budget = float(metadata["budget"]) if "budget" in metadata else None
            return Expert(tensors, mu, density, scope, rescale, values, budget, statistics)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: bad expert metadata: {error}") from None


def whole_expert(tensors: Mapping[str, ExpertTensor], values: str, budget: float | None = None) -> Expert:
    """An expert that is not of single entries, and so added as it is."""
    return Expert(tensors, 1.0, None, None, "number", values, budget)


def check_task_name(name: str, argument: str = "models") -> str:
    """``name`` itself; ArgumentError if it cannot be the name of a file."""
    if not isinstance(name, str) or not name or name.startswith(".") or any(c in name for c in "/\\\0"):
        raise ArgumentError(f"{argument}: {name!r} cannot name a task: it must be usable as a file name")
    try:
        written = os.fsencode(hidden(Path(f"{name}.safetensors")).name)
    except UnicodeEncodeError:
        raise ArgumentError(f"{argument}: {name!r} cannot name a task: it is no text of the file system") from None
    if len(written) > _LONGEST_NAME:
        raise ArgumentError(f"{argument}: {name:.40} ... cannot name a task: it is too long for a file's name")
    return name
