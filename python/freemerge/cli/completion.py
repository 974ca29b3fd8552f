"""freemerge completion."""

from __future__ import annotations

from click.shell_completion import get_completion_class

from .arguments import Named
from .command import Argument, Command
from .commands import COMPLETION, NAME, Commands
from .failures import DONE
from .output import Output

SHELLS = ("bash", "fish", "zsh")


def command() -> Command:
    """The command."""
    return Command(
        run,
        [Argument("shell", type=Named(SHELLS), metavar="SHELL", help=", ".join(SHELLS))],
        examples="""
            freemerge completion bash > ~/.local/share/bash-completion/completions/freemerge
            freemerge completion fish > ~/.config/fish/completions/freemerge.fish
            freemerge completion zsh > ~/.zfunc/_freemerge    # a folder of fpath
        """,
    )


def run(output: Output, shell: str) -> int:
    """Print the script that makes a shell complete commands, options and their values."""
    kind = get_completion_class(shell)
    assert kind is not None  # one of SHELLS
    script = kind(Commands(), {}, NAME, COMPLETION).source()
    output.result({"shell": shell, "script": script}, script.rstrip("\n"))
    return DONE
