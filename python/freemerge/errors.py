"""Every error freemerge raises on purpose derives from FreemergeError."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FreemergeError(Exception):
    """Base class of all freemerge errors."""


class ArgumentError(FreemergeError, ValueError):
    """An argument, option or recipe field is invalid; the message names it."""


class CheckpointError(FreemergeError, ValueError):
    """A checkpoint, tensor or expert file is unreadable, inconsistent or non-finite; the message names it."""


class BackendError(FreemergeError, RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


class RefusedError(FreemergeError, RuntimeError):
    """The operation would overwrite or lose something and was not started."""


class WorkerError(FreemergeError, RuntimeError):
    """Another of the processes that merge together has ended before the work was done."""


class CudaError(BackendError):
    """A call of the CUDA runtime or of cuFFT, or a kernel launch, failed.

    ``operation`` names it, ``code`` is the cudaError_t or cufftResult (0 if there is none), ``file`` and ``line`` say
    where in the native sources it was issued.
    """

    operation: str = ""
    code: int = 0
    file: str = ""
    line: int = 0


def did_you_mean(word: object, known: Iterable[str], *, listed: bool = False) -> str:
    """The end of a message about an unknown word: the closest known one, or all of them unless it ``listed`` them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1) if isinstance(word, str) else []
    if close:
        return f"; did you mean {close[0]!r}?"
    return "" if listed else f"; known: {', '.join(known)}"


def counted(count: int, one: str, many: str = "") -> str:
    """``1 tensor`` or ``2 tensors``; ``many`` where an s is not all."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"
