"""What an expert holds of one tensor, and the registry of its codings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import ArgumentError, did_you_mean
from ..payload import Bytes, Reader

Seen = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class ExpertTensor(ABC):
    """One tensor of an expert, coded; a subclass with a ``coding`` registers itself under that name.

    To add a coding, write one file into this folder: how a tensor is encoded, what it adds to the weights, its bytes
    in the expert file, and what makes these bytes invalid.
    """

    coding: ClassVar[str]  #: its name in metadata and arguments
    takes: ClassVar[tuple[str, ...]] = ()  #: what of :func:`freemerge.extract_experts` is for it
    of_backbone: ClassVar[str] = ""  #: what it is of a merged model, which has to be given then
    shape: tuple[int, ...]

    def __init_subclass__(cls) -> None:
        if "coding" in cls.__dict__ and CODINGS.setdefault(cls.coding, cls) is not cls:
            raise TypeError(f"there are two codings called {cls.coding!r}")

    @property
    def numel(self) -> int:
        """Number of entries of the dense tensor."""
        return math.prod(self.shape)

    @property
    @abstractmethod
    def entries(self) -> int:
        """How many numbers are kept."""

    @property
    def relative(self) -> bool:
        """Whether what is added depends on the merged task vector."""
        return False

    @property
    def keeps(self) -> bool:
        """Whether what it depends on (:meth:`seen`) takes so long to find that it is kept."""
        return False

    @classmethod
    def seen(cls, vector: torch.Tensor) -> Seen:
        """What :meth:`dense` of a :attr:`relative` coding has to know of ``vector``, theta_m - theta_0 in its shape."""
        return (vector,)

    def check(self, seen: Seen) -> None:  # noqa: B027 most codings have nothing to check
        """Raise ArgumentError if :meth:`seen` is not of the theta_m - theta_0 that the tensor was made for."""

    @abstractmethod
    def dense(self, device: torch.device | None = None, seen: Seen = ()) -> torch.Tensor:
        """What is added to the weights, not yet multiplied by mu: float32, in the shape of the tensor.

        A mask over a float64 vector gives float64.

        ``seen``: what :meth:`seen` returned for it, on the same device; ArgumentError where it is needed and not given.
        """

    @abstractmethod
    def to_bytes(self) -> Bytes:
        """All but the shape, for the expert file."""

    @classmethod
    @abstractmethod
    def from_bytes(cls, shape: tuple[int, ...], reader: Reader) -> ExpertTensor:
        """The inverse of :meth:`to_bytes`; ValueError for bytes that it does not write."""


CODINGS: dict[str, type[ExpertTensor]] = {}
"""All codings by name."""


def coding_of(name: object) -> type[ExpertTensor]:
    """The coding called ``name``; ArgumentError if there is none."""
    if not isinstance(name, str) or name not in CODINGS:
        hint = did_you_mean(name, CODINGS, listed=True)
        raise ArgumentError(f"values must be one of {', '.join(CODINGS)}, got {name!r}{hint}")
    return CODINGS[name]
