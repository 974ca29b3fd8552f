"""What a module, or transformers given a config.json, says about a model: layer types, tied weights, buffers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..lazy import cached_property
from .conversion import Layout, layout_of, loaded_names
from .json_file import read_json
from .locate import entry

CONFIG = "config.json"
_COUNTS = ("layer", "block", "depth", "expert")  # config entries that multiply the modules of a model
_INPUTS_FIRST = ("Conv1D", "Llama4TextExperts")  # classes of layers whose weights are [inputs, outputs]


class Architecture:
    """A module whose values do not matter: it may be on the meta device. Names are those of the model's files."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @cached_property
    def layout(self) -> Layout | None:
        """How the module's tensors lie in files; None where it is the same."""
        return layout_of(self.module)

    def file_name(self, name: str) -> str:
        """What files call a tensor of the module; its own name where they hold it otherwise."""
        return (self.layout and self.layout.file_name(name)) or name

    @cached_property
    def loaded_name(self) -> Callable[[str], str]:
        """What a tensor of a file is called once it is loaded, for files of any version."""
        return loaded_names(self.module)

    def layer(self, name: str) -> str | None:
        """The class of the layer that holds the tensor ``name``: ``Linear``, ``Conv1D``; None if there is none."""
        owner = self._owner(name)
        return None if owner is None else type(owner).__name__

    def transposed(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a file holds the weight ``name`` as [..., inputs, outputs], where ``Linear`` has outputs first.

        ``Conv1D`` does, and so do the stacked experts of some models, which transformers marks, or turns when it loads.
        """
        owner = self._owner(name)
        experts = getattr(owner, "is_transposed", False) is True and not name.endswith("bias")
        turned = experts or type(owner).__name__ in _INPUTS_FIRST
        expected = self._shapes.get(name, self._shapes.get(self.loaded_name(name), shape))
        if self.layout is not None and name in self.layout.pieces:
            expected, piece = self.layout.files[name], self.layout.pieces[name][0]
            sides = zip(piece.shape, piece.file_strides, piece.strides, strict=True)
            turned ^= any(size > 1 and in_file == 1 and stride != 1 for size, in_file, stride in sides)
        return turned ^ (shape != expected and shape == (*expected[:-2], *expected[:-3:-1]))

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}

    def _owner(self, name: str) -> nn.Module | None:
        """The layer that holds a tensor of a file."""
        pieces = self.layout.pieces.get(name) if self.layout is not None else None
        found = _layer_at(self.module, pieces[0].module if pieces else name)
        return found or _layer_at(self.module, self.loaded_name(name))  # names without the model's prefix, or older

    def ties(self) -> dict[str, str]:
        """Second names of the same parameter, each with the name that comes first."""
        named = list(self.module.named_parameters(remove_duplicate=False))
        second = second_names(self.module)
        first: dict[int, str] = {}
        tied: dict[str, str] = {}
        for name, parameter in sorted(named, key=lambda item: item[0] in second):
            if first.setdefault(id(parameter), name) != name:
                tied[self.file_name(name)] = self.file_name(first[id(parameter)])
        return tied

    @cached_property
    def unsaved(self) -> set[str]:
        """Tensors that transformers does not write to files, as it computes them: tables of sines."""
        patterns = getattr(self.module, "_keys_to_ignore_on_save", None) or ()
        names = self.module.state_dict().keys()
        return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}

    def buffers(self) -> set[str]:
        """Names of the tensors that are not parameters."""
        return {self.file_name(name) for name, _ in self.module.named_buffers(remove_duplicate=False)}


def _layer_at(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split(".")[:-1]:
        inner = module._modules.get(part)
        if inner is None:
            return None
        module = inner
    return module


def second_names(module: nn.Module) -> set[str]:
    """What transformers declares to be another tensor of the module, tied or not: heads."""
    declared = getattr(module, "all_tied_weights_keys", None) or getattr(module, "_tied_weights_keys", None) or ()
    return set(map(str, declared))


def read_config(directory: Path | None) -> dict[str, Any]:
    """The config.json of a model directory; empty where there is none or it is not a JSON object.

    Raises CheckpointError for a link that leads out of the directory.
    """
    if directory is None or not (directory / CONFIG).is_file():
        return {}
    path = entry(directory, CONFIG)
    try:
        config = read_json(path)
    except CheckpointError:
        return {}
    return config if isinstance(config, dict) else {}


def text_entry(config: dict[str, object], name: str) -> object:
    """An entry of a config, or of the part of it that is about text."""
    text = config.get("text_config")
    return config.get(name, text.get(name) if isinstance(text, dict) else None)


def require_config(directory: Path | None) -> None:
    """Raise CheckpointError for a config.json that cannot be read, which nothing could load the merged model by."""
    path = None if directory is None else directory / CONFIG
    if path is None or not path.is_file():
        return
    raw = path.read_bytes().strip()
    if raw == b"{}" or (raw.startswith(b"{") and read_config(directory)):  # copied as it is: no mark before it
        return
    raise CheckpointError(f"{path}: not a JSON object; the merged model would get it as it is")


def version_of_transformers() -> str | None:
    """The version whose classes say how layers, ties and files lie; None where it is not installed."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def built_from_config(config: dict[str, Any], tensors: int) -> Architecture | None:
    """The model that transformers builds from a config, without memory for its weights.

    None where transformers is not installed, the class is not its own (no code of a model directory is ever run), or
    the config describes many more layers than the ``tensors`` of the checkpoint.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or _largest_count(config) > max(1000, tensors):
        return None
    if importlib.util.find_spec("transformers") is None:
        return None
    with _quiet_transformers() as transformers:
        model_class = getattr(transformers, str(names[0]), None)
        if not isinstance(model_class, type) or not issubclass(model_class, nn.Module):
            return None
        try:
            with torch.device("meta"):
                return Architecture(model_class(model_class.config_class.from_dict(config)))  # type: ignore[attr-defined]
        except Exception:  # a config can be wrong in any way, and then tells nothing
            return None


def _largest_count(config: object, key: str = "") -> int:
    if isinstance(config, dict):
        return max((_largest_count(value, str(name)) for name, value in config.items()), default=0)
    counted = isinstance(config, int) and any(word in key for word in _COUNTS)
    return int(config) if counted else 0  # type: ignore[call-overload]


@contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """transformers, without what it prints about configs that are only looked at."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield transformers
    finally:
        transformers.logging.set_verbosity(verbosity)
