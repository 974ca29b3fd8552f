"""What an analysis found, as data and in the forms that it is read in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .advice import Advice
from .measures import Measures


@dataclass(frozen=True)
class TensorMeasures:
    """The measures of one tensor, and what its name tells of its place; ``depth`` is None outside of layers."""

    name: str
    shape: tuple[int, ...]
    module_type: str
    depth: int | None
    measures: Measures


@dataclass(frozen=True)
class Analysis:
    """What :func:`freemerge.analyze` found. ``to_dict()`` is all of it as JSON types, ``to_html()`` the report.

    Attributes:
        base: name of the base.
        tasks: names of the K models.
        band_edges: B + 1 radii between the bands of a spectrum, as fractions of min(H, W); the last one is infinite.
        ranks: numbers of singular directions that ``top`` of a :class:`Spectrum` is about.
        scales: label of each method -> the scale that its recipe's "auto" stands for.
        total: of all tensors.
        module_types: of the tensors that have equal names but for the numbers of layers.
        depths: of the tensors of each layer.
        tensors: of each one, in the order of a merge.
        left_out: names of the tensors that are not merged, but copied or averaged.
        notices: what is worth knowing about the inputs, in sentences.
        advice: a method, its scale and the reason.
    """

    base: str
    tasks: tuple[str, ...]
    band_edges: tuple[float, ...]
    ranks: tuple[int, ...]
    scales: dict[str, float]
    total: Measures
    module_types: dict[str, Measures]
    depths: dict[int, Measures]
    tensors: tuple[TensorMeasures, ...]
    left_out: tuple[str, ...]
    notices: tuple[str, ...]
    advice: Advice

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types: the attributes, by their names; None for an infinite edge and for no value."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain | {"band_edges": [*self.band_edges[:-1], None]}

    def to_text(self) -> str:
        """The headline numbers in a few lines."""
        from .report.summary import summary

        return summary(self)

    def to_html(self) -> str:
        """The report: one HTML page that needs no other file."""
        from .report.page import page

        return page(self)


def _plain(value: Any) -> Any:
    """Tuples as lists and keys as strings, as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
