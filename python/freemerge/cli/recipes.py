"""The options of a recipe, made from what declares its fields and those of the methods, and the recipe they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import ArgumentError
from ..merging.recipe import PRESETS, Recipe
from ..methods import METHODS
from ..methods.filtered import Filter
from ..methods.parameters import FLAG, Parameter, parameters_of
from .arguments import BASE_HELP, PATH, Named, Parsed, names
from .command import Argument, Option

PARAMETERS = "Parameters of the methods, with their defaults"


def inputs(default: str = "fr") -> list[click.Parameter]:
    """Base, models, and every option of a recipe, whose method is ``default`` unless one names another. :func:`read`
    takes their values."""
    section = "Method"
    return [
        Argument("base", type=PATH, required=False, metavar="BASE", help=f"{BASE_HELP}; not with --mergekit"),
        Argument("models", type=PATH, nargs=-1, metavar="MODEL...", help="fine-tuned checkpoints"),
        Option(
            "--method",
            section=section,
            type=Named(sorted(METHODS)),
            metavar="NAME",
            help=f"merging method: {', '.join(sorted(METHODS))} (default {default}, or the recipe's)",
        ),
        Option(
            "--preset",
            section=section,
            type=Named(PRESETS),
            metavar="NAME",
            help="start from a published setting; docs/presets.md lists them",
        ),
        Option("--recipe", section=section, type=PATH, metavar="FILE", help="start from a recipe in YAML"),
        Option(
            "--mergekit",
            section=section,
            type=PATH,
            metavar="FILE",
            help="base, models and method as a configuration of mergekit has them",
        ),
        *(_option(name, {"": common}, section) for name, common in parameters_of(Recipe).items()),
        *(_option(name, users, PARAMETERS) for name, users in _parameters().items()),
        *names(),
    ]


def read(
    base: Path | None, models: Sequence[Path], options: dict[str, Any], default: str = "fr"
) -> tuple[Path | str, Sequence[Path | str], Recipe]:
    """Base, models and recipe from values of :func:`inputs`, which are taken out of ``options``.

    The recipe is the preset or the file, or of the method ``default``, with every option that was given laid over it.
    """
    given = {name: options.pop(name) for name in ("preset", "recipe", "mergekit", "method", "select", "rename")}
    texts = {name: options.pop(name) for name in (*parameters_of(Recipe), *_parameters())}
    origin, tuned, recipe = _start(base, models, given["preset"], given["recipe"], given["mergekit"], default)
    changes: dict[str, Any] = {} if given["method"] is None else {"method": given["method"]}
    method = type(recipe.method) if given["method"] is None else METHODS[given["method"]]
    known = parameters_of(Recipe) | parameters_of(method)
    if texts["filter"] is not None or recipe.filter is not None:
        known |= parameters_of(Filter)
    for name, value in texts.items():
        if value is None:
            continue
        if name not in known:
            users = sorted(user for user in _parameters()[name] if user in METHODS)
            beside = "; --filter before or after filters beside it" if name == "cutoff" else ""
            hint = f", which is for --method {' or '.join(users)}{beside}"
            raise ArgumentError(f"method {method.name} has no option {_flag(name)}{hint}")
        changes[name] = value if isinstance(value, bool) else known[name].parse(_flag(name), value)
    if given["mergekit"] is not None and recipe.layers and "weights" in changes:
        raise ArgumentError("--weights: the configuration has weights by the tensors' names; change them there")
    if given["select"]:
        changes["select"] = (*given["select"], *recipe.select)
    if given["rename"]:
        changes["rename"] = (*given["rename"], *recipe.rename)
    return origin, tuned, recipe.replace(**changes)


def _start(
    base: Path | None,
    models: Sequence[Path],
    preset: str | None,
    file: Path | None,
    mergekit: Path | None,
    default: str,
) -> tuple[Path | str, Sequence[Path | str], Recipe]:
    """Base, models, and the recipe that options are laid over."""
    if sum(origin is not None for origin in (preset, file, mergekit)) > 1:
        raise ArgumentError("--preset, --recipe and --mergekit exclude each other")
    if mergekit is not None:
        from ..merging.mergekit_yaml import read_mergekit

        if base is not None:
            raise ArgumentError("--mergekit names base and models; give no others")
        return read_mergekit(mergekit)
    if base is None or not models:
        raise ArgumentError("BASE and at least one MODEL are required")
    if file is not None:
        return base, models, Recipe.from_yaml(file)
    return base, models, Recipe(method=default) if preset is None else Recipe.preset(preset)


def _parameters() -> dict[str, dict[str, Parameter]]:
    """Every parameter of a method, or of a filter around it: its name, and what it is for each that has it."""
    found: dict[str, dict[str, Parameter]] = {}
    for method, cls in sorted(METHODS.items()):
        for name, parameter in parameters_of(cls).items():
            found.setdefault(name, {})[method] = parameter
    for name, parameter in parameters_of(Filter).items():
        found.setdefault(name, {})["filter"] = parameter
    return found


def _option(name: str, users: Mapping[str, Parameter], section: str) -> Option:
    """The option of a parameter, with what it means for each user. Its text is read when the method is known."""
    meanings: dict[str, list[str]] = {parameter.help: [] for parameter in users.values()}
    for user, parameter in users.items():
        meanings[parameter.help].append(": ".join(filter(None, (user, _default(parameter)))))
    begin, end = "[]" if any(users) else ("(default ", ")")
    help = "; ".join(
        f"{meaning} {begin}{', '.join(who)}{end}" if any(who) else meaning for meaning, who in meanings.items()
    )
    if all(use.kind is FLAG for use in users.values()):
        return Option(f"{_flag(name)}/--no-{_flag(name)[2:]}", section=section, default=None, help=help)
    choices = dict.fromkeys(choice or "none" for use in users.values() for choice in use.choices)
    kinds = dict.fromkeys(use.kind.metavar for use in users.values() if use.kind is not None)
    return Option(
        _flag(name), section=section, type=Parsed(str, *choices), metavar="|".join([*choices, *kinds]), help=help
    )


def _default(parameter: Parameter) -> str:
    """The default as an option has it; nothing where there is none, or a flag that is off."""
    value = parameter.default
    return "" if value is None or isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
