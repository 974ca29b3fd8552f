"""Updates of tensors, in place and exactly undone: of single entries, or of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from .. import _core
from ..backends.base import Backend
from ..backends.registry import pick
from ..backends.sparse import Scratch, SparseVector, Update, index_pointer
from ..dense import address, location
from ..errors import ArgumentError


class Switch:
    """Updates made ready to be turned on and off many times: checked, indexed and addressed once.

    It keeps entries and origins, but only the addresses of the weights: :meth:`fits` says whether tensors still have
    them. Raises ArgumentError if an update cannot be made. Each device's tensors are changed in one native call.
    """

    def __init__(self, updates: Sequence[Update], *, backend: str = "auto", scratch: Scratch | None = None) -> None:
        self._locations = [location(update.weights) for update in updates]
        self._scratch = Scratch() if scratch is None else scratch
        groups: dict[tuple[Backend, torch.device], list[int]] = {}
        for i, update in enumerate(updates):
            _check(update)
            if update.entries.indices.numel():
                groups.setdefault((pick(backend, (update.weights,)), update.weights.device), []).append(i)
        self._parts = [(kind.switch([updates[i] for i in members]), members) for (kind, _), members in groups.items()]

    def wait(self) -> None:
        """Wait until the preparation is done on every device, so that the switch may be used on any stream."""
        for part, _ in self._parts:
            part.wait()

    def fits(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether tensors are, in their order, where and what those of the updates were."""
        return self._locations == [location(tensor) for tensor in weights]

    def on(self, weights: Sequence[torch.Tensor]) -> ExitStack:
        """Change ``weights``, which must fit, in place; closing the stack puts back what was there, bit for bit.

        If one change cannot be made, none is.
        """
        with ExitStack() as undo:
            for part, members in self._parts:
                undo.callback(part.on([weights[i] for i in members], self._scratch))
            return undo.pop_all()


@contextmanager
def add_dense(weights: torch.Tensor, terms: Iterable[tuple[torch.Tensor, float]]) -> Iterator[None]:
    """Within the block, ``weights`` has ``sum_j factor_j * tensor_j`` added; then it is as before, bit for bit.

    Terms are added in their order in float32 (float64 for float64 weights), and the sum is rounded once.
    """
    weights = weights.detach()
    compute = torch.promote_types(weights.dtype, torch.float32)
    total: torch.Tensor | None = None
    for tensor, factor in terms:
        scaled = tensor.to(compute) * factor
        total = scaled if total is None else total.add_(scaled)
    saved = weights.clone()
    try:
        if total is not None:
            weights.copy_(total.add_(weights.to(compute)))
        yield
    finally:
        weights.copy_(saved)


def _check(update: Update) -> None:
    """Kernels trust what they are given: refuse what would read or write outside of a tensor."""
    weights, entries = update.weights, update.entries
    parts = [entries.indices, entries.values] + ([] if update.origin is None else [update.origin])
    if any(tensor.device != weights.device for tensor in parts):
        raise ArgumentError(f"update must be on the device of the weights, {weights.device}")
    if any(tensor.shape != (entries.indices.numel(),) or not tensor.is_contiguous() for tensor in parts):
        raise ArgumentError("update must hold contiguous vectors of one length")
    if entries.indices.dtype not in (torch.int32, torch.int64) or entries.values.dtype != torch.float32:
        raise ArgumentError(
            f"update must hold int32 or int64 indices and float32 values, "
            f"not {entries.indices.dtype} and {entries.values.dtype}"
        )
    if update.origin is not None and update.origin.dtype != weights.dtype:
        raise ArgumentError(f"update has an origin of {update.origin.dtype} for weights of {weights.dtype}")
    least, most = entries.bounds
    if least < 0 or most >= weights.numel():
        raise ArgumentError(f"update has an index outside the tensor: {least} to {most} of {weights.numel()} entries")


def weighted_sum(terms: Sequence[tuple[SparseVector, float]]) -> SparseVector:
    """``sum_j weight_j * values_j`` over the union of positions; terms are added in their order, in float32."""
    device = terms[0][0].indices.device
    on_cpu = [(term.to(torch.device("cpu")), weight) for term, weight in terms]
    indices, values = _core.sparse_sum(
        [(*index_pointer(term.indices), address(term.values), weight) for term, weight in on_cpu]
    )
    return SparseVector(torch.from_numpy(indices), torch.from_numpy(values)).to(device)
