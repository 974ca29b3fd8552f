"""Arguments that several commands have, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
from click.shell_completion import CompletionItem

from ..errors import did_you_mean
from ..merging.selection import Action
from .command import Argument, Option

BASE_HELP = "the pretrained checkpoint all models started from"


class _Path(click.Path):
    """A path that is given: an empty text, as a variable that is not set, is not the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A text that a function reads, which raises ValueError with what it expects; ``words`` complete it."""

    def __init__(self, parse: Callable[[str], Any], *words: str) -> None:
        self.name = parse.__name__
        self._parse = parse
        self._words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in self._words if word.startswith(incomplete)]


class Named(click.Choice[str]):
    """One of some names; a misspelt one is answered by the closest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        return f"there is no {value!r}{did_you_mean(str(value), self.choices)}"

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return f"One of {', '.join(self.choices)}"


def base_and_models() -> list[click.Parameter]:
    """BASE MODEL..."""
    return [
        Argument("base", type=PATH, help=BASE_HELP),
        Argument("models", type=PATH, nargs=-1, required=True, metavar="MODEL...", help="fine-tuned checkpoints"),
    ]


def names() -> list[click.Parameter]:
    """--select and --rename."""
    return [
        Option(
            "--select",
            section="Tensors",
            type=Parsed(rule),
            multiple=True,
            metavar="PATTERN=ACTION",
            help=f"what happens to tensors of such names: {', '.join(get_args(Action))}; repeatable, the first that "
            "fits counts",
        ),
        Option(
            "--rename",
            section="Tensors",
            type=Parsed(renaming),
            multiple=True,
            metavar="OLD=NEW",
            help="names of models that begin with OLD begin with NEW instead, as the base's do; repeatable",
        ),
    ]


def tokenizer_from() -> Option:
    """--tokenizer-from."""
    return Option(
        "--tokenizer-from",
        section="Output",
        type=Parsed(tokenizer, "base", "auto"),
        default="base",
        metavar="WHICH",
        help="tokenizer, chat template and generation settings of base, of the model of that number (from 0), or auto: "
        "the models', if all have the same",
    )


def tokenizer(text: str) -> str | int:
    """base, auto or the number of a model."""
    if text in ("base", "auto"):
        return text
    if not text.isdecimal():
        raise ValueError(f"expected base, auto or the number of a model, got {text!r}")
    return int(text)


def rule(text: str) -> tuple[str, str]:
    """A pattern of names and an action."""
    pattern, separator, action = text.rpartition("=")
    if not separator or action not in get_args(Action):
        raise ValueError(f"expected PATTERN=ACTION with one of {', '.join(get_args(Action))}, got {text!r}")
    return pattern, action


def renaming(text: str) -> tuple[str, str]:
    """Two prefixes."""
    old, separator, new = text.partition("=")
    if not separator or old == new:
        raise ValueError(f"expected OLD=NEW, two prefixes of which one may be empty, got {text!r}")
    return old, new
