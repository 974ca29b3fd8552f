"""Which way a square adapted matrix is stored: out x in, as ``Linear``, or in x out, as transformers' ``Conv1D``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError
from .reader import Checkpoint
from .spec import TensorSpec


@dataclass(frozen=True)
class Target:
    """A weight of the base and whether the adapter's product fits it as it is, or transposed, by their shapes.

    ``misfit`` is the message for one that does not fit the way its layer is stored.
    """

    name: str
    fits_plain: bool
    fits_turned: bool
    misfit: str

    def fits(self, *, turned: bool) -> bool:
        return self.fits_turned if turned else self.fits_plain


class Orientation:
    """Answers for every target of one adapter.

    PEFT goes by the type of each layer and overrules ``fan_in_fan_out`` in the config, which after mixed targets says
    no more than what the last one was. Shapes decide wherever they can. For square matrices the layer types do, where
    they are known (a module, or a config.json that transformers can build); in a model without any sign of ``Conv1D``
    the config is right; otherwise the layers of the same name that are not square tell. What is left is refused.
    """

    def __init__(self, base: Checkpoint, fan_in_fan_out: bool, targets: Sequence[Target]) -> None:
        self._base = base
        self._config = fan_in_fan_out
        self._shown = _shown_by_biases(base.specs)
        if targets and not any(target.fits(turned=fan_in_fan_out) for target in targets):
            raise CheckpointError(targets[0].misfit)
        decided = {target.fits_turned for target in targets if target.fits_plain != target.fits_turned}
        self._mixed = decided | set(self._shown.values()) | {fan_in_fan_out} == {False, True}

    def turned(self, target: Target) -> bool:
        """Whether the weight is stored in x out. Raises CheckpointError where it does not fit, or cannot be told."""
        turned = self._layer(target.name)
        if turned is None and target.fits_plain != target.fits_turned:
            turned = target.fits_turned
        if turned is None and not self._mixed:
            turned = self._config
        if turned is None:
            raise CheckpointError(
                f"{target.name} is square, and whether it is a Conv1D cannot be told from the base's tensors and "
                "fan_in_fan_out; pass the base as a module, or as a directory with its config.json"
            )
        if not target.fits(turned=turned):
            raise CheckpointError(target.misfit)
        return turned

    def _layer(self, name: str) -> bool | None:
        """Whether the layer is a Conv1D; None if it is not known, or not needed and known only to transformers."""
        if self._mixed or self._base.module is not None:
            architecture = self._base.architecture
            layer = architecture.layer(name) if architecture is not None else None
            if layer is not None:
                return layer == "Conv1D"
        return self._shown.get(_last(name))


def _shown_by_biases(specs: Mapping[str, TensorSpec]) -> dict[str, bool]:
    """For each last part of a module's name, whether its matrices are stored in x out, where biases tell for all."""
    shown: dict[str, set[bool]] = {}
    for name, spec in specs.items():
        bias = specs.get(name.removesuffix(".weight") + ".bias")
        if len(spec.shape) == 2 and name.endswith(".weight") and bias is not None and len(bias.shape) == 1:
            fits = [size == bias.shape[0] for size in spec.shape]
            if fits[0] != fits[1]:
                shown.setdefault(_last(name), set()).add(fits[1])
    return {last: kinds.pop() for last, kinds in shown.items() if len(kinds) == 1}


def _last(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else name
