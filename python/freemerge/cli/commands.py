"""The commands of ``freemerge``, each of which is a file of this folder that is imported when it is used.

To add one: a line here, and a file with a function ``command()`` that returns a :class:`Command`.
"""

from __future__ import annotations

from importlib import import_module

import click

from .. import __version__
from ..errors import did_you_mean

NAME = "freemerge"
COMPLETION = "_FREEMERGE_COMPLETE"  # what the scripts of `freemerge completion` set

SECTIONS = {
    "Merge": {
        "init": "write a recipe with comments, from a base and models",
        "merge": "merge checkpoints into one",
        "inspect": "what a merge would do to each tensor",
        "tune": "learn the weights of a merge from unlabelled data, into a recipe",
        "mergekit-yaml": "mergekit's own command, with freemerge's methods in it",
    },
    "Parts of models": {
        "experts": "extract a light expert of each model",
        "lora": "what a model has and its base lacks, as a LoRA adapter",
    },
    "Look at models": {
        "analyze": "what the task vectors have in common, before and after merging: a report",
        "diff": "how two checkpoints differ, tensor by tensor",
        "evaluate": "score models with your own function",
        "verify": "check a merged directory against its manifest",
    },
    "This installation": {
        "backends": "what can filter on this machine, and if not, why",
        "clean": "remove what killed runs left in a directory",
        "completion": "print what makes a shell complete commands and options",
        "demo": "train, merge and compare small real models (about a minute)",
        "schema": "print the JSON schema of recipes, for editors",
    },
}
NAMES = [name for section in SECTIONS.values() for name in section]

_EPILOG = """\
Exit status: 0 done, 1 failed, 2 wrong usage, 3 refused because something would be lost, 129, 130 and 143 \
ended by SIGHUP, Ctrl-C and SIGTERM. diff and verify: 1 if they find something.

Each command has a help of its own with examples: freemerge merge --help"""


class Commands(click.Group):
    """The commands by their names."""

    def __init__(self) -> None:
        super().__init__(
            NAME,
            help="Merge fine-tuned models of one base into one.",
            epilog=_EPILOG,
            context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
        )
        show = click.version_option(__version__, prog_name=NAME, message="%(prog)s %(version)s")
        show(self)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return NAMES

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in NAMES:
            return None
        module = import_module(f".{cmd_name.replace('-', '_')}", __package__)
        command: click.Command = module.command()
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in NAMES and not args[0].startswith("-"):
            raise click.UsageError(f"there is no command {args[0]!r}{did_you_mean(args[0], NAMES)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()), col_max=20)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write_text(self.epilog or "")
