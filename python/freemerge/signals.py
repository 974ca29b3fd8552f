"""Signals that ask the command to stop, as exceptions, so that what was half made is removed on the way out."""

from __future__ import annotations

import signal
import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):  # not on Windows
    _WORDS[signal.SIGHUP] = "hung up"


class Stop(KeyboardInterrupt):
    """A signal that asked the process to stop. ``str()`` says what happened, ``code`` is the exit status for it."""

    def __init__(self, number: int) -> None:
        super().__init__(_WORDS[signal.Signals(number)])
        self.code = 128 + number


@contextmanager
def stops() -> Iterator[None]:
    """Within the block the first of these signals raises :class:`Stop`; later ones do not disturb the cleaning up.

    Python drops what is raised while it frees memory (in ``__del__`` and in callbacks of weak references) and calls
    ``sys.unraisablehook``; a signal that arrives just then is sent again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped = ended = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise Stop(number)

    def again(number: int) -> None:
        nonlocal stopped
        time.sleep(0.01)  # what was freed is gone by then
        if not ended:
            stopped = False
            _send(number)

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if isinstance(unraisable.exc_value, Stop):
            start_new_thread(again, (unraisable.exc_value.code - 128,))  # which takes no lock: one may be held here
        else:
            former_hook(unraisable)

    heard = [number for number in _WORDS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
    former = {number: signal.signal(number, stop) for number in heard}
    former_hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
    finally:
        ended = True
        sys.unraisablehook = former_hook
        for number, handler in former.items():
            signal.signal(number, handler)


def _send(number: int) -> None:
    """A signal for the main thread, which wakes it where the system can do that."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:
        signal.raise_signal(number)
