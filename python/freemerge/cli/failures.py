"""What the command says when it fails, and its exit status."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from ..errors import ArgumentError
from .output import UnprintedError, print_result, printable, say

DONE, FAILED, USAGE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130


class Failures:
    """Tells failures on standard error in a line, or as an object: with --json on standard output, with --log-json as
    the last event.

    Arguments that could not be parsed are told as they ask for, so flags are looked for in the words themselves.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._json, self._log = "--json" in arguments, "--log-json" in arguments
        self._verbose = not {"-v", "--verbose"}.isdisjoint(arguments)
        self._begun = False
        self._out: Path | None = None
        self._before: object = None

    def watch(self, out: Path | None) -> None:
        """After an interruption, say whether this output was written from now on; None says nothing of one."""
        self._begun, self._out, self._before = True, out, _identity(out)

    def tell(self, error: BaseException, code: int, message: str | None = None) -> int:
        """Say what went wrong, with --verbose where it was raised, and return the exit status."""
        if message is None:
            system = isinstance(error, OSError) and error.filename
            message = f"{error.filename}: {error.strerror}" if system else str(error)  # type: ignore[attr-defined]
        if self._verbose and not isinstance(error, click.UsageError):
            say("".join(traceback.format_exception(error)).rstrip("\n"))
        kind = ArgumentError if isinstance(error, click.UsageError) else type(error)
        told = {"type": kind.__name__, "message": message, "status": code}
        if self._json:
            try:
                print_result(json.dumps({"error": told}))
            except UnprintedError:
                say(f"freemerge: {printable(message)}")
        elif self._log:
            say(json.dumps({"event": "error", **told}))
        else:
            say(f"freemerge: {printable(message)}")
        return code

    def tell_usage(self, error: click.UsageError) -> int:
        """The same for arguments that cannot be parsed, with a hint at the help of their command."""
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            say(error.format_message())
            return USAGE
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        return self.tell(error, USAGE, error.format_message() + hint)

    def tell_unprinted(self, error: UnprintedError) -> int:
        """The same on standard error, where standard output takes nothing, with what became of the output."""
        self._json = False
        told = f"the result cannot be printed: {error}"
        return self.tell(error, FAILED, f"{told}; {self._out} was written" if self._written else told)

    @property
    def _written(self) -> bool:
        return _identity(self._out) != self._before

    def tell_interruption(self, stop: KeyboardInterrupt) -> int:
        """The same for a signal, with what became of the output."""
        told = str(stop) or "interrupted"
        if self._written:
            told += f"; {self._out} was written"
        elif self._out is not None or not self._begun:
            told += "; no output was written"
        return self.tell(stop, getattr(stop, "code", INTERRUPTED), told)


def _identity(out: Path | None) -> object:
    """What tells an output from the one that is put in its place."""
    try:
        status = os.stat(out) if out is not None else None
    except OSError:
        return None
    return status and (status.st_dev, status.st_ino)
