"""Functions of the user's on the command line: what they print is no result, and their failures are told as theirs."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from traceback import extract_tb
from typing import Any

from ..errors import ArgumentError, FreemergeError


@contextmanager
def user_function(reference: str) -> Iterator[Callable[..., Any]]:
    """The function that ``reference`` names, to be called within the block, where standard output is standard error.

    Whatever it or its file raises, an exit too, is an ArgumentError that says where; an interruption stays one.
    """
    from ..evaluation import load_function

    with redirect_stdout(sys.stderr):
        try:
            function = load_function(reference)
        except (FreemergeError, KeyboardInterrupt):
            raise
        except (Exception, SystemExit) as error:
            raise _failure(reference, error) from error

        def called(*arguments: Any) -> Any:
            with _told(reference):
                returned = function(*arguments)
            return _drawn(reference, returned) if isinstance(returned, Iterator) else returned

        yield called


def file_of(reference: str) -> Path | None:
    """The file that ``reference`` names; that of a module is known once it is loaded."""
    place = reference.rpartition(":")[0]
    file = place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)
    return None if file is None else Path(file)


def _drawn(reference: str, items: Iterator[Any]) -> Iterator[Any]:
    """What a generator of the user's yields, whose body runs when it is asked for more."""
    while True:
        with _told(reference):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@contextmanager
def _told(reference: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        raise _failure(reference, error) from error


def _failure(reference: str, error: BaseException) -> ArgumentError:
    text = ": ".join(filter(None, (type(error).__name__, str(error))))
    place = _place(error)
    return ArgumentError(f"function {reference}: {text}" + (f" (at {place})" if place else ""))


def _place(error: BaseException) -> str:
    """The last line of the user's own files that was executed; where all are of Python or installed, the last line."""
    if isinstance(error, SyntaxError):
        return ""  # its text has the place
    ours = Path(__file__).resolve().parents[1]
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()} - {ours}
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    frames = [frame for frame in frames if ours not in Path(frame.filename).resolve().parents]
    own = [frame for frame in frames if installed.isdisjoint(Path(frame.filename).resolve().parents)]
    last = (own or frames)[-1:]
    return f"{last[0].filename}:{last[0].lineno}" if last else ""
