"""What the command prints: results on standard output, as text or JSON; what else is to say, on standard error."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any


class UnprintedError(Exception):
    """The result cannot be printed, for instance on a full disk; ``str()`` says why."""


@dataclass(frozen=True)
class Output:
    """How much is said, and how: by --json, --quiet and --verbose."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    @property
    def talks(self) -> bool:
        """Whether people read along."""
        return not (self.json or self.quiet)

    def result(self, value: object, text: str) -> None:
        """What was asked for: for programs an object, which can get new keys, and a text for people."""
        if self.json:
            told = plain(value)
            assert isinstance(told, dict)
            print_result(json.dumps(told))
        elif not self.quiet:
            print_result(printable(text))

    def note(self, text: str) -> None:
        """Something worth knowing beside the result."""
        if self.talks:
            say(printable(text))

    def detail(self, text: str) -> None:
        """A note for those who asked for more."""
        if self.verbose:
            self.note(text)


def open_streams() -> None:
    """Let everything be printed: to nowhere where a stream is closed, and characters that its encoding lacks as codes.

    A file must not be opened in the place of a closed stream: it would get what libraries print.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  until the process ends
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def release_streams() -> None:
    """What cannot be printed must not fail again when the process flushes its streams at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def say(text: str) -> None:
    """A line on standard error, if it can be written: no work is given up for it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def print_result(text: str) -> None:
    """A line on standard output; UnprintedError if it takes none, BrokenPipeError if its reader has closed it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UnprintedError(error.strerror or str(error)) from error


def printable(text: object) -> str:
    """Without control characters, which names in files may hold."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def plain(value: Any) -> Any:
    """Dataclasses and paths as JSON types; JSON has no number for what is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
