"""Every error freemerge raises on purpose derives from FreemergeError."""


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
