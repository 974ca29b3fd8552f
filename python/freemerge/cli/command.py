"""One command: its options in sections, examples, and what all commands have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import cleandoc
from typing import Any

import click

from .failures import Failures
from .output import Output


class Option(click.Option):
    """An option of a section of the help."""

    def __init__(self, *names: str, section: str = "Options", **settings: Any) -> None:
        super().__init__(names, **settings)
        self.section = section


class Argument(click.Argument):
    """A positional argument with a line in the help."""

    def __init__(self, name: str, *, help: str, **settings: Any) -> None:
        super().__init__([name], **settings)
        self.explained = help


class Command(click.Command):
    """A function as a command: it is given an :class:`Output` and its parameters, and returns the exit status.

    Its docstring is the help. ``examples`` are lines of a shell.
    """

    def __init__(self, run: Callable[..., int], parameters: Sequence[click.Parameter] = (), *, examples: str) -> None:
        self.examples = cleandoc(examples)
        parameters = [*parameters, *_common()]
        super().__init__(run.__name__, callback=run, params=parameters, help=run.__doc__)

    def invoke(self, ctx: click.Context) -> Any:
        said = {name: ctx.params.pop(name, False) for name in ("json", "quiet", "verbose")}
        if said["quiet"] and said["verbose"]:
            raise click.UsageError("--quiet and --verbose exclude each other.", ctx)
        if isinstance(ctx.obj, Failures):
            ctx.obj.watch(ctx.params.get("out"))
        ctx.params["output"] = Output(**said)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, Argument):
                sections.setdefault("Arguments", []).append((parameter.make_metavar(ctx), parameter.explained))
            elif (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "section", "Common options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples.splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def _common() -> list[Option]:
    section = "Common options"
    return [
        Option("--json", is_flag=True, section=section, help="print the result as JSON, and errors"),
        Option("-q", "--quiet", is_flag=True, section=section, help="print nothing but errors"),
        Option("-v", "--verbose", is_flag=True, section=section, help="say more, and where an error was raised"),
    ]
