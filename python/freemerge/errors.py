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


class CudaError(BackendError):
    """A call of the CUDA runtime or of cuFFT, or a kernel launch, failed.

    ``operation`` names it, ``code`` is the cudaError_t or cufftResult (0 if there is none), ``file`` and ``line`` say
    where in the native sources it was issued.
    """

    operation: str = ""
    code: int = 0
    file: str = ""
    line: int = 0
