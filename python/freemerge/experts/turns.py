"""Whose turn it is to change weights: that of one context, whose blocks nest, whatever banks they belong to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from weakref import ref

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..dense import dense
from ..errors import ArgumentError


class Weights:
    """What tells whether two models share weights: their modules, wherever these are moved, and the memory they had."""

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        owners, tensors = [], model.values() if isinstance(model, Mapping) else [*model.parameters(), *model.buffers()]
        if isinstance(model, nn.Module):
            owners = [module for module in model.modules() if module._parameters or module._buffers]
        self._storages = []  # weak; while these references live, no other storage gets an address of theirs
        for tensor in tensors:
            with suppress(ArgumentError):  # what has no memory of its own cannot be changed in place
                storage = dense(tensor, "model").untyped_storage()
                self._storages.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        self._parts = frozenset({*map(ref, owners), *(storage.cdata for storage in self._storages)})

    def meet(self, other: Weights) -> bool:
        """Whether some are those of the other model."""
        return self is other or not self._parts.isdisjoint(other._parts)


@contextmanager
def turn(weights: Weights) -> Iterator[ExitStack]:
    """A block in which no other context changes ``weights``; the stack, which it closes, holds what undoes its changes.

    It waits for blocks of other contexts, that is of other threads and tasks, and nests within those of its own: these
    are the blocks entered in it, and in the context that it is a copy of, before. ArgumentError where it would have to
    wait in the thread of an event loop, which would stop. Any context may leave it, such as that of another thread
    which goes on with a generator, or collects it as garbage.

    ArgumentError, too, where it is left before one inside of it, as by generators that take turns: former weights only
    come back in order, so the inner block ends with it.
    """
    block = _Block(weights)
    try:
        block.enter()
        yield block.undo
    finally:
        try:
            block.leave()
        finally:
            in_order = block.leave()  # goes on where an interrupt has come between
    if not in_order:
        raise ArgumentError(
            "experts: a block was left before one inside of it; all of these have ended, and the weights are as they "
            "were before: use the experts of a model in one coroutine or generator at a time"
        )


class _Block:
    """One turn. It keeps others waiting until its changes are undone; from the start of that on it has ``ended``."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.undo = ExitStack()
        self.ended = False
        self._ending: list[_Block] = []  # with it, outwards from the last
        self._closing = ExitStack()  # what is left to do for that

    def enter(self) -> None:
        """Wait for the blocks of other contexts, and go inside of those of this one."""
        with _lock:
            while waited := {block for block in list(_open) if block.weights.meet(self.weights)} - {*_around()}:
                if _in_event_loop() and not all(block.ended for block in waited):
                    raise ArgumentError(
                        "experts: another task or thread has experts of this model on, and to wait for it would stop "
                        "the event loop: let tasks take turns, as by an asyncio.Lock around the block"
                    )
                _changed.wait(_SECONDS)
            _open[self] = None
        _entered.set((*_around(), self))

    def leave(self) -> bool:
        """End it and the blocks inside of it, from the innermost outwards; whether it was open, and the innermost.

        It may be called again if an exception, such as an interrupt, has come between.
        """
        with _lock:
            if self in _open and not self.ended:
                self._ending = self._with_those_inside()
                for block in self._ending:
                    self._closing.callback(block.undo.close)
                for block in reversed(self._ending):  # itself last: all is prepared
                    block.ended = True
        try:
            self._closing.close()
        finally:
            _remove(self._ending)
        return len(self._ending) == 1

    def _with_those_inside(self) -> list[_Block]:
        found = [self]
        blocks = list(_open)
        for later in blocks[blocks.index(self) + 1 :]:
            if any(later.weights.meet(block.weights) for block in found):
                found.append(later)
        return found


_lock = threading.RLock()  # of the list; reentrant, as garbage may be collected while it is held
_changed = threading.Condition(_lock)
_SECONDS = 0.1  # after which it looks again: garbage collected on the way to the wait has notified nobody
_open: dict[_Block, None] = {}  # in the order in which they were entered; only ever read as a whole, by list
_entered: ContextVar[tuple[_Block, ...]] = ContextVar("blocks entered in a context", default=())


def _remove(ended: list[_Block]) -> None:
    with _lock:
        for block in ended:
            _open.pop(block, None)
        _changed.notify_all()
    _entered.set(_around())


def _around() -> tuple[_Block, ...]:
    """The blocks that this context is inside of."""
    return tuple(block for block in _entered.get() if not block.ended)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
