"""The ``freemerge`` command: arguments in, text or JSON and an exit status out. One file a command.

What a command runs is imported when it runs, so that help, completion and wrong arguments do not wait for torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click
from click.shell_completion import shell_complete

from ..errors import ArgumentError, FreemergeError, RefusedError
from .commands import COMPLETION, NAME, Commands
from .failures import FAILED, REFUSED, USAGE, Failures
from .output import UnprintedError, open_streams, release_streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 failed, 2 wrong usage, 3 refused; 129, 130 and
    143 ended by SIGHUP, Ctrl-C and SIGTERM. Help, and arguments that cannot be parsed, raise SystemExit with it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not take time from those that read
    open_streams()
    try:
        return _status(sys.argv[1:] if arguments is None else list(arguments))
    except OSError:  # nobody takes what is said
        return FAILED
    finally:
        release_streams()


def _status(arguments: list[str]) -> int:
    """Run a command and tell its failures; OSError where they cannot be told."""
    commands = Commands()
    if COMPLETION in os.environ:
        return shell_complete(commands, {}, NAME, COMPLETION, os.environ[COMPLETION])
    failures = Failures(arguments)
    try:
        with commands.make_context(NAME, [*arguments], obj=failures) as context:
            code = int(commands.invoke(context))
        sys.stdout.flush()
        return code
    except click.exceptions.Exit as end:  # after --help or --version
        raise SystemExit(end.exit_code) from None
    except click.UsageError as error:
        raise SystemExit(failures.tell_usage(error)) from None
    except ArgumentError as error:
        return failures.tell(error, USAGE)
    except RefusedError as error:
        return failures.tell(error, REFUSED)
    except UnprintedError as error:
        return failures.tell_unprinted(error)
    except BrokenPipeError:  # the reader has closed the pipe
        raise
    except (FreemergeError, OSError) as error:
        return failures.tell(error, FAILED)
    except KeyboardInterrupt as stop:
        return failures.tell_interruption(stop)
