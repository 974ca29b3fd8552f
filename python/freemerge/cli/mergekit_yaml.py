"""freemerge mergekit-yaml."""

from __future__ import annotations

import click

from ..errors import ArgumentError
from .failures import DONE


def command() -> click.Command:
    """The command, whose arguments are all for mergekit."""
    return _Passed("mergekit-yaml", add_help_option=False)


class _Passed(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = args
        return []

    def invoke(self, ctx: click.Context) -> int:
        try:
            from ..integrations.mergekit import run_yaml
        except ModuleNotFoundError as error:
            if error.name != "mergekit":
                raise
            raise ArgumentError("mergekit is not installed: pip install 'freemerge[mergekit]'") from None
        ctx.obj.watch(None)  # mergekit writes its output bit by bit
        assert ctx.parent is not None
        run_yaml(ctx.args, ctx.parent)
        return DONE
