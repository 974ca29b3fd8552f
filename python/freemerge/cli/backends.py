"""freemerge backends."""

from __future__ import annotations

from .command import Command
from .failures import DONE
from .output import Output


def command() -> Command:
    """The command."""
    return Command(
        run,
        examples="""
            freemerge backends
            freemerge backends --json
        """,
    )


def run(output: Output) -> int:
    """Say what can filter on this machine, and if not, why."""
    from ..backends.registry import backends

    found = list(backends().values())
    lines = []
    for backend in found:
        lines.append(f"{backend.name:8} {'available' if backend.available else 'not available: ' + backend.reason}")
        lines += [f"         {key}: {value}" for key, value in backend.details.items()]
    output.result({"backends": found}, "\n".join(lines))
    return DONE
