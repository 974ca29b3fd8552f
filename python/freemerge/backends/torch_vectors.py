"""Accumulate, select and switch in torch operations, on any device: the reference of the native kernels.

Both round in the same places (each product, then each sum, model after model, no fused multiply-add), so the tensors
they return are the same bytes; the means, float64 sums in another order, agree to about 1e-12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch

from .. import _core
from ..dense import writing
from .base import Backend, Entries
from .memory import arithmetic_of
from .sparse import BackendSwitch, Scratch, Update, flat_memory

_CHUNK = 1 << 22  # entries taken at a time, which bounds the extra memory
_LEADING_SHIFT = 31 - _core.LEADING_BITS


class TorchVectors(Backend):
    """The operations on vectors; a backend overrides those for which it has kernels."""

    def weighted_sum(
        self,
        base: torch.Tensor,
        models: Sequence[torch.Tensor],
        weights: Sequence[float] | None,
        out: torch.Tensor | None,
    ) -> list[float]:
        compute = arithmetic_of([base, *models])
        sums = [torch.zeros((), dtype=torch.float64, device=base.device) for _ in models]
        for chunk, stored in _chunks(base):
            wide = stored.to(compute)
            for i, model in enumerate(models):
                v = model.view(-1)[chunk].to(compute) - wide
                sums[i] += v.abs().sum(dtype=torch.float64)
                if weights is not None and out is not None:
                    v.mul_(weights[i])
                    target = out.view(-1)[chunk]
                    target.copy_(v) if i == 0 else target.add_(v)
        return [float(total) / max(1, base.numel()) for total in sums]

    def square_sum(self, tensor: torch.Tensor) -> float:
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for _, part in _chunks(tensor)]
        return math.fsum(torch.stack(norms).square().tolist()) if norms else 0.0  # waits for a device once

    def add_round(
        self, out: torch.Tensor, base: torch.Tensor, delta: torch.Tensor, scale: float, factor: float
    ) -> bool | None:
        compute = arithmetic_of([base, delta])
        for chunk, target in _chunks(out):
            scaled = (delta.view(-1)[chunk].to(compute) * factor).mul_(scale)
            target.copy_(scaled.add_(base.view(-1)[chunk].to(compute)))
        return None

    def elect(
        self,
        delta: torch.Tensor,
        weight: float,
        least: float,
        outlier: float,
        sums: Sequence[torch.Tensor],
        shares: Sequence[torch.Tensor],
    ) -> None:
        for chunk, part in _chunks(delta):
            magnitude = part.abs().float()
            left_out = magnitude < least
            if math.isfinite(outlier):
                left_out |= magnitude >= outlier
            v = (part * weight).masked_fill_(left_out, 0.0)
            for side, elected in enumerate((v.where(v > 0, 0.0), v.where(v < 0, 0.0))):
                sums[side].view(-1)[chunk].add_(elected)
                if shares:
                    shares[side].view(-1)[chunk].add_(elected != 0, alpha=abs(weight))

    def decide(self, sums: Sequence[torch.Tensor], shares: Sequence[torch.Tensor]) -> None:
        for chunk, positive in _chunks(sums[0]):
            negative = sums[1].view(-1)[chunk]
            total = positive + negative
            if shares:
                positive.div_(shares[0].view(-1)[chunk])
                negative = negative / shares[1].view(-1)[chunk]
            positive.copy_(torch.where(total > 0, positive, negative)).masked_fill_(total == 0, 0.0)

    def select_largest(self, model: torch.Tensor, base: torch.Tensor, rows: int, width: int, k: int) -> Entries:
        v = self._difference(model, base).view(rows, width)
        magnitudes = _bits(v)
        kept = min(k, width)
        if kept == 0:
            return _entries(v, torch.zeros_like(v, dtype=torch.bool))
        kth = magnitudes.topk(kept, dim=1).values[:, -1:]
        above = magnitudes > kth
        ties = (magnitudes == kth) & (magnitudes != 0)
        room = kept - above.sum(dim=1, keepdim=True)
        return _entries(v, above | (ties & (ties.cumsum(dim=1) <= room)))

    def count_magnitudes(
        self, model: torch.Tensor, base: torch.Tensor | None, counts: torch.Tensor, shift: int, above: int
    ) -> None:
        size, bits = counts.numel(), counts.numel().bit_length() - 1
        for _, v in self._differences(model, base):
            leading = _bits(v) >> shift
            counts += torch.bincount(leading[leading >> bits == above] & (size - 1), minlength=size).cpu()

    def select_from_bin(self, model: torch.Tensor, base: torch.Tensor, lowest: int) -> Entries:
        indices = [torch.empty(0, dtype=torch.int64, device="cpu")]
        values = [torch.empty(0, dtype=torch.float32, device="cpu")]
        for begin, v in self._differences(model, base):
            found = _entries(v, _bits(v) >= max(1, lowest << _LEADING_SHIFT))
            indices.append(found[0] + begin)
            values.append(found[1])
        return torch.cat(indices), torch.cat(values)

    def switch(self, updates: Sequence[Update]) -> BackendSwitch:
        return _Switch(updates)

    def _differences(self, model: torch.Tensor, base: torch.Tensor | None) -> Iterator[tuple[int, torch.Tensor]]:
        """model - base, or model, in float32, chunk by chunk, with the first index of each."""
        for chunk, part in _chunks(model):
            yield chunk.start, part.float() if base is None else self._difference(part, base.view(-1)[chunk])

    def _difference(self, model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        v = torch.empty(base.numel(), dtype=arithmetic_of([base, model]), device=base.device)
        self.weighted_sum(base, [model], [1.0], v)
        return v.float()


def _chunks(tensor: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    flat = tensor.view(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        yield slice(begin, begin + _CHUNK), flat[begin : begin + _CHUNK]


def _bits(v: torch.Tensor) -> torch.Tensor:
    """The bits of |v|, which order as the magnitudes do, with NaN above infinity."""
    return v.abs().view(torch.int32)


def _entries(v: torch.Tensor, mask: torch.Tensor) -> Entries:
    indices = mask.view(-1).nonzero().squeeze(1)
    return indices.cpu(), v.view(-1)[indices].cpu()


def _put(memory: torch.Tensor, where: torch.Tensor, values: torch.Tensor) -> None:
    with writing(memory):
        memory[where] = values


class _Switch(BackendSwitch):
    def __init__(self, updates: Sequence[Update]) -> None:
        self._updates = [
            (update.entries.places(update.weights).long(), update.entries.values, update.scale, update.origin)
            for update in updates
        ]

    def on(self, weights: Sequence[torch.Tensor], scratch: Scratch) -> Callable[[], None]:
        with ExitStack() as undo:
            for tensor, (where, values, scale, origin) in zip(weights, self._updates, strict=True):
                memory = flat_memory(tensor)
                saved = memory[where]
                start, compute = saved if origin is None else origin, arithmetic_of([memory])
                changed = (start.to(compute) + values.to(compute) * scale).to(memory.dtype)
                undo.callback(_put, memory, where, saved)
                _put(memory, where, changed)
            return undo.pop_all().close

    def wait(self) -> None:
        self._updates[-1][0][-1].item()  # a read waits for the stream
