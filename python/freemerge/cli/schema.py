"""freemerge schema."""

from __future__ import annotations

import json

from .command import Command
from .failures import DONE
from .output import Output


def command() -> Command:
    """The command."""
    return Command(run, examples="freemerge schema > recipe.schema.json")


def run(output: Output) -> int:
    """Print the JSON schema of recipes, by which editors complete and check them."""
    from ..merging.schema import recipe_schema

    schema = recipe_schema()
    output.result(schema, json.dumps(schema, indent=2))
    return DONE
