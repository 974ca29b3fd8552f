"""Processes that do one piece of work together, as torchrun starts them. The only file that knows torch.distributed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import FreemergeError, WorkerError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Key = TypeVar("Key")

PATIENCE = timedelta(days=2)  # a worker that is done waits for the others; those that have ended are noticed at once


@dataclass
class Workers:
    """This process, number ``rank``, and the others: ``size`` altogether. By default it is alone.

    What concerns all (:meth:`gather`, :meth:`total`, :meth:`first`) is called by every worker in the same order.
    WorkerError, if one of them has ended.

    Attributes:
        kept: the directory in which an unfinished output was left, to be resumed.
    """

    rank: int = 0
    size: int = 1
    kept: Path | None = None

    def gather(self, value: T) -> list[T]:
        """What each worker gives, by rank; anything that can be pickled."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        with _noticing():
            distributed.all_gather_object(values, value)
        return values

    def total(self, counts: Tensor) -> Tensor:
        """The sum of the workers' tensors of integers."""
        if self.size > 1:
            from torch import distributed

            with _noticing():
                distributed.all_reduce(counts)
        return counts

    def first(self, work: Callable[[], T]) -> T:
        """Work that the first worker does for all: they get its result, or raise its error."""
        if self.size == 1:
            return work()
        result: T | None = None
        error: FreemergeError | None = None
        if self.rank == 0:
            try:
                result = work()
            except FreemergeError as caught:
                error = caught
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return cast(T, result)

    def shares(self, nbytes: Mapping[Key, int]) -> dict[Key, int]:
        """Who does what: for each key a rank. The largest first, each to the one that has the fewest bytes yet."""
        loads = [0] * self.size
        ranks = {}
        for key in sorted(nbytes, key=lambda key: -nbytes[key]):
            ranks[key] = loads.index(min(loads))
            loads[ranks[key]] += nbytes[key]
        return ranks


ALONE = Workers()


@contextmanager
def _noticing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WorkerError("another worker has ended before the work was done") from error


@contextmanager
def joined() -> Iterator[Workers]:
    """A context manager: the workers that torchrun has started, this process among them; alone without it.

    What several workers find wrong is told by one of them: the others end without a word. After an error this process
    ignores SIGTERM, as it is about to end. Each worker takes the GPU with its number on its machine.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Workers()
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    store, rank, size = next(rendezvous("env://"))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    workers = Workers(rank, size)

    def is_first_to_say(text: str) -> bool:
        with suppress(RuntimeError):  # the agent that keeps the store has ended, too
            return bool(store.add(text, 1) == 1)
        return True

    try:
        yield workers
    except (Exception, KeyboardInterrupt) as error:
        with suppress(ValueError):  # not the main thread, to which alone signals come
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would end this one before it has said it
        kept = f"what is finished stays in {workers.kept}; the same command with --resume goes on with it"
        if workers.kept is not None and is_first_to_say(kept):
            print(f"freemerge: {kept}", file=sys.stderr)
        if not is_first_to_say(str(error)):
            raise SystemExit(getattr(error, "code", 1)) from None
        raise
    distributed.destroy_process_group()
