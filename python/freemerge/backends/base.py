"""What a backend must offer to plug into the planner. Backends execute a Plan or refuse it; they decide nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..planner.costs import Traits
from ..planner.plan import Plan


@dataclass(frozen=True)
class BackendInfo:
    """What :func:`freemerge.backends` tells about a backend; ``reason`` says why it cannot run, or is empty."""

    name: str
    available: bool
    reason: str = ""
    details: dict[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """One implementation of the forms of a Plan."""

    @property
    def name(self) -> str: ...

    def info(self) -> BackendInfo:
        """Whether it can run on this machine at all; cheap, and the answer does not change in a process."""
        ...

    def traits(self, device: torch.device) -> Traits | None:
        """Its capabilities on a device, or None if it cannot use that kind of device."""
        ...

    def supports(self, plan: Plan) -> str | None:
        """None if :meth:`run` can execute the plan, else the reason, as the rest of a sentence after its name."""
        ...

    def run(self, plan: Plan, batches: Sequence[torch.Tensor], scale: float) -> None:
        """Filter each matrix of each batch, [H, W] or [B, H, W], in place and multiply it by ``scale``.

        All matrices have shape ``plan.matrix``, dtype ``plan.dtype``, are on ``plan.device``, share no memory, and
        have unit column stride (``stride(-1) == 1``); the row stride is any number >= W, and so is the batch's.
        Arithmetic is at least fp32. Results must not depend on the number of threads.
        """
        ...


def matrices(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each matrix of the batches."""
    for x in batches:
        if x.ndim == 2:
            yield x
        else:
            yield from x.unbind(0)


def addresses(batches: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Where each matrix of the batches starts, and its row stride in elements."""
    pointers: list[int] = []
    strides: list[int] = []
    for x in batches:
        (height, width), first = x.shape[-2:], x.data_ptr()
        stride = x.stride(-2) if height > 1 else width
        if x.ndim == 2:
            pointers.append(first)
            strides.append(stride)
        else:
            count, step = x.shape[0], x.stride(0) * x.element_size()
            pointers.extend(first + i * step for i in range(count))
            strides.extend([stride] * count)
    return pointers, strides


def multiply_(batches: Sequence[torch.Tensor], factor: float) -> None:
    """The filter whose gain is one constant; a gain of 0 clears even what is not finite."""
    if factor != 1.0:
        for x in batches:
            x.mul_(factor) if factor else x.zero_()
