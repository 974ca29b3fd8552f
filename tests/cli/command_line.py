"""The command line as tests call it, on three models of two tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from freemerge.cli import main
from freemerge.cli.commands import NAMES

COMMANDS = [name for name in NAMES if name != "mergekit-yaml"]  # that one is mergekit's


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def merged(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")
