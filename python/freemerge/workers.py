"""Processes that do one piece of work together, as torchrun starts them. The only file that knows torch.distributed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

from .errors import FreemergeError, WorkerError, counted

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
Key = TypeVar("Key")

PATIENCE = timedelta(days=2)  # a worker that is done waits for the others; those that have ended are noticed at once
ARRIVAL = timedelta(minutes=1)  # after which no more workers are expected to come


@dataclass
class Workers:
    """This process, number ``rank``, and the others: ``size`` altogether. By default it is alone.

    What concerns all (:meth:`gather`, :meth:`total`, :meth:`first`) is called by every worker in the same order.
    WorkerError, if one of them has ended or does something else, and always after an error has left a piece of work
    (:meth:`together`).

    Attributes:
        kept: the directory in which an unfinished output was left, to be resumed.
    """

    rank: int = 0
    size: int = 1
    kept: Path | None = None
    _group: Any = field(default=None, init=False, repr=False)  # of processes, if it is ours
    _parted: bool = field(default=False, init=False, repr=False)
    _work: str = field(default="", init=False, repr=False)
    _step: int = field(default=0, init=False, repr=False)  # since that began
    _pieces: int = field(default=0, init=False, repr=False)  # of work so far

    def gather(self, value: T) -> list[T]:
        """What each worker gives, by rank; anything that can be pickled."""
        return [value] if self.size == 1 else self._gathered("gather", value)

    def total(self, counts: Tensor) -> Tensor:
        """The sum of the workers' tensors of integers."""
        if self.size > 1:
            from torch import distributed

            self._gathered("total", tuple(counts.shape))
            with _noticing():
                distributed.all_reduce(counts, group=self._group)
        return counts

    def first(self, work: Callable[[], T]) -> T:
        """Work that the first worker does for all: they get its result, or raise its error."""
        if self.size == 1:
            return work()
        result: T | None = None
        error: FreemergeError | OSError | None = None
        if self.rank == 0:
            try:
                result = work()
            except (FreemergeError, OSError) as caught:
                error = caught
        result, error = self._gathered("first", (result, error))[0]
        if error is not None:
            raise error
        return cast(T, result)

    @contextmanager
    def together(self, work: str) -> Iterator[None]:
        """A piece of work of all workers. After an error has left it on one of them they have parted for good, and all
        raise WorkerError: the others would wait for what it did not do, and take what it does next for that.
        """
        self._pieces += 1
        self._work, self._step = f"{work} {self._pieces}", 0
        try:
            yield
        except BaseException:
            self.part()
            raise
        finally:
            self._work = ""

    def part(self) -> None:
        """Have nothing more to do with the other workers, who notice that at once."""
        if self.size > 1:
            self._parted = True
        group, self._group = self._group, None
        if group is not None:
            from torch import distributed

            with suppress(RuntimeError, ValueError, AssertionError):  # the program has ended all groups
                distributed.destroy_process_group(group)

    def _gathered(self, kind: str, value: T) -> list[T]:
        """What each worker gives, if all are at the same step of the same work."""
        from torch import distributed

        if self._parted:
            raise WorkerError("these workers have parted after an error; begin again with new ones")
        self._step += 1
        place = (self._work, self._step, kind)
        given: list[Any] = [None] * self.size
        with _noticing():
            distributed.all_gather_object(given, (place, value), group=self._group)
        for rank, (other, _) in enumerate(given):
            if other != given[0][0]:
                self.part()
                raise WorkerError(
                    f"worker {rank} does something else ({_named(other)}) than the first one ({_named(given[0][0])})"
                )
        return [value for _, value in given]

    def shares(self, nbytes: Mapping[Key, int]) -> dict[Key, int]:
        """Who does what: for each key a rank. The largest first, each to the one that has the fewest bytes yet."""
        loads = [0] * self.size
        ranks = {}
        for key in sorted(nbytes, key=lambda key: -nbytes[key]):
            ranks[key] = loads.index(min(loads))
            loads[ranks[key]] += nbytes[key]
        return ranks


ALONE = Workers()


def _named(place: tuple[str, int, str]) -> str:
    work, step, kind = place
    return f"{work or 'no merge'}, step {step}, {kind}"


@contextmanager
def _noticing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WorkerError("another worker has ended before the work was done") from error


@contextmanager
def joined() -> Iterator[Workers]:
    """A context manager: the workers that torchrun has started, this process among them; alone without it.

    In a program that has made a process group they are the processes of that, which stays as it is. WorkerError if not
    all of them come, within a minute of the last that did. What several workers find wrong is told by one of them: the
    others end without a word. After an error this process ignores SIGTERM, as it is about to end. Each worker takes
    the GPU with its number on its machine.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        yield Workers()
        return
    workers, store = _met()

    def is_first_to_say(text: str) -> bool:
        with suppress(RuntimeError):  # the agent that keeps the store has ended, too
            return bool(store.add(text, 1) == 1)
        return True

    try:
        yield workers
    except (Exception, KeyboardInterrupt) as error:
        with suppress(ValueError):  # not the main thread, to which alone signals come
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would end this one before it has said it
        workers.part()
        kept = f"what is finished stays in {workers.kept}; the same command with --resume goes on with it"
        if workers.kept is not None and is_first_to_say(kept):
            print(f"freemerge: {kept}", file=sys.stderr)
        if not is_first_to_say(str(error)):
            raise SystemExit(getattr(error, "code", 1)) from None
        raise
    workers.part()


def _met() -> tuple[Workers, Store]:
    """The workers that torchrun has started, when all have come, and what they share: nothing with other programs."""
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        # Keys of our own: a program that torchrun started has others in the same store, and may start this one.
        found, rank, size = next(rendezvous("env://", timeout=ARRIVAL))
        if inside := distributed.is_initialized():
            rank, size = distributed.get_rank(), distributed.get_world_size()
        ours = PrefixStore("freemerge", found)
        store = PrefixStore((_lead if rank == 0 else _follow)(ours, size), ours)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        if inside:
            group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        else:
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
            group = distributed.group.WORLD
    except FreemergeError:
        raise
    except (RuntimeError, ValueError) as error:
        told = str(error).partition("\n")[0]
        raise WorkerError(f"the workers that torchrun started cannot be reached ({told}); {_ALONE}") from error
    workers = Workers(rank, size)
    workers._group = group
    return workers, store


_ALONE = (
    "a program that one of them starts has its environment, too: without TORCHELASTIC_RUN_ID in that it works alone"
)


# The first worker says under which name it meets the others now, since processes that ended may have left theirs.


def _lead(store: Store, size: int) -> str:
    """Wait for the others, and return the name."""
    name = uuid4().hex
    store.set("meeting", name)
    here = _Arrivals(lambda: store.add(name, 0))
    while here.count < size - 1:
        if here.over():
            store.set("meeting", "")
            raise _missing(counted(size - 1 - here.most, "worker"), size)
    store.set("meeting", "")
    store.set(f"{name}-begun", "")
    return name


def _follow(store: Store, size: int) -> str:
    """Come to the meeting of the first worker, and return its name when all have come."""
    name = ""
    here = _Arrivals(lambda: store.add(name, 0) if name else 0)
    while not (name and store.check([f"{name}-begun"])):
        if here.over():
            if name:
                store.add(name, -1)
            missing = size - 1 - here.most if name else 0
            raise _missing(counted(missing, "worker") if missing else "the first one", size)
        now = store.get("meeting").decode() if store.check(["meeting"]) else ""
        if now and now != name:
            name = now
            store.add(name, 1)
    return name


def _missing(who: str, size: int) -> WorkerError:
    return WorkerError(f"{who} of the {size} that torchrun started did not come to merge; {_ALONE}")


class _Arrivals:
    """How many have come, and whether it is too long ago that one did: else who never comes is waited for for days."""

    def __init__(self, ask: Callable[[], int]) -> None:
        self._ask, self._since = ask, time.monotonic()
        self.count = self.most = ask()

    def over(self) -> bool:
        """Whether nobody has come for so long; asked now and then."""
        time.sleep(0.05)
        self.count = self._ask()
        if self.count > self.most:  # it is less when one has given up
            self.most, self._since = self.count, time.monotonic()
        return time.monotonic() - self._since > ARRIVAL.total_seconds()
