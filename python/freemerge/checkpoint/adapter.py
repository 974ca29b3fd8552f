"""PEFT adapters read as fine-tuned models: the base with LoRA or IA3 applied, one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .locate import display_name
from .reader import Checkpoint, Source
from .safetensors_file import SafetensorsFile
from .spec import MERGEABLE

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")
_IA3 = re.compile(r"(.+)\.ia3_l$")


def is_adapter(source: object) -> bool:
    """Whether a path is the directory of a PEFT adapter."""
    return isinstance(source, (str, os.PathLike)) and (Path(source) / CONFIG_FILE).is_file()


def open_model(source: Source | Checkpoint, base: Checkpoint) -> Checkpoint:
    """Open a fine-tuned model of ``base``: any checkpoint, or the directory of a PEFT adapter trained on it."""
    return AdaptedCheckpoint(Path(str(source)), base) if is_adapter(source) else Checkpoint.open(source)


class AdaptedCheckpoint(Checkpoint):
    """``base`` with a LoRA or IA3 adapter applied, as PEFT's ``merge_and_unload`` does, computed when it is read.

    LoRA: W + s B A with s = lora_alpha / r (/ sqrt(r) with ``use_rslora``), rank and alpha patterns included. IA3:
    W scaled along its outputs, or along its inputs for feed-forward modules; the bias of the former too. Tensors that
    the adapter holds in full (``modules_to_save``, trained biases) replace the base's. Adapted tensors are float32
    (float64 where the base is), so a task vector keeps what a bfloat16 sum would round away; nothing but the tensor
    being read is ever held. ``base`` is shared, and stays open.

    Raises CheckpointError, naming the file, for other kinds of adapters and for tensors that do not fit the base.
    """

    def __init__(self, path: Path, base: Checkpoint) -> None:
        config = _config(path / CONFIG_FILE)
        self.path = path
        self.directory = None
        self.files = (path / CONFIG_FILE, path / WEIGHTS_FILE)
        self.label = str(path)
        self.name = display_name(path)
        self._base = base
        self._file = SafetensorsFile(path / WEIGHTS_FILE)
        self._full: dict[str, str] = {}  # tensor -> the adapter's key that replaces it, before any change
        self._changes: dict[str, Callable[[Tensor], Tensor]] = {}
        if config["peft_type"] == "LORA":
            self._plan_lora(config)
        else:
            self._plan_ia3(config)
        touched = self._full.keys() | self._changes.keys()
        self.specs = {
            name: spec.with_dtype(_wide(spec.dtype)) if name in touched else spec for name, spec in base.specs.items()
        }
        self.tied = {name: first for name, first in base.tied.items() if name not in touched}

    def read(self, name: str) -> Tensor:
        tensor = self._file.read(self._full[name]) if name in self._full else self._base.read(name)
        tensor = tensor.to(self.specs[name].dtype)
        return self._changes[name](tensor) if name in self._changes else tensor

    def origin(self, name: str) -> str:
        touched = name in self._full or name in self._changes
        return str(self.files[1]) if touched else self._base.origin(name)

    def close(self) -> None:
        self._full, self._changes = {}, {}

    def _plan_lora(self, config: Mapping[str, Any]) -> None:
        pairs: dict[str, dict[str, str]] = {}
        for key in self._file.slots:
            found = _LORA.match(key)
            if found is None:
                self._plan_replacement(key)
                continue
            module = found.group(1).removeprefix(_PREFIX)
            pairs.setdefault(module, {})[found.group(3)] = key
            pairs[module]["embedding"] = found.group(2) or ""
        for module, pair in pairs.items():
            name = self._named(f"{module}.weight", pair.get("A") or pair["B"])
            if not {"A", "B"} <= set(pair):
                raise CheckpointError(f"{self.files[1]}: {module} has only one of lora_A and lora_B")
            shapes = self._file.slots[pair["A"]].spec.shape, self._file.slots[pair["B"]].spec.shape
            turned = bool(pair["embedding"]) or bool(config.get("fan_in_fan_out"))
            product = (shapes[1][0], shapes[0][1]) if [len(shape) for shape in shapes] == [2, 2] else ()
            expected = self._base.specs[name].shape
            if shapes[0][0] != shapes[1][-1] or (product[::-1] if turned else product) != expected:
                raise CheckpointError(
                    f"{self.files[1]}: {module} has lora_A {shapes[0]} and lora_B {shapes[1]}, which do not make up "
                    f"the base's {name} {expected}"
                )
            scale = _scale(config, self.files[0], module, shapes[0][0])
            self._changes[name] = self._lora(pair["A"], pair["B"], scale, turned)

    def _lora(self, key_a: str, key_b: str, scale: float, turned: bool) -> Callable[[Tensor], Tensor]:
        def apply(weight: Tensor) -> Tensor:
            # In float64, which autocast and lowered matmul precisions leave alone.
            a, b = self._file.read(key_a).double(), self._file.read(key_b).double()
            change = a.T @ b.T if turned else b @ a
            return change.mul_(scale).add_(weight).to(weight.dtype)

        return apply

    def _plan_ia3(self, config: Mapping[str, Any]) -> None:
        for key in self._file.slots:
            found = _IA3.match(key)
            if found is None:
                self._plan_replacement(key)
                continue
            module = found.group(1).removeprefix(_PREFIX)
            name = self._named(f"{module}.weight", key)
            shape, expected = self._file.slots[key].spec.shape, self._base.specs[name].shape
            turned = bool(config.get("fan_in_fan_out"))
            shape = shape[::-1] if turned else shape
            if len(expected) != 2 or shape not in ((expected[0], 1), (1, expected[1])):
                raise CheckpointError(f"{key} {shape} of {self.files[1]} does not scale the base's {name} {expected}")
            self._changes[name] = self._ia3(key, shape)
            bias = f"{module}.bias"
            # A feed-forward module's input is scaled, which its bias never meets.
            if not _is_feedforward(config, module) and bias in self._base.specs:
                self._changes[bias] = self._ia3(key, (-1,))

    def _ia3(self, key: str, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        return lambda weight: weight * self._file.read(key).to(weight.dtype).reshape(shape)

    def _plan_replacement(self, key: str) -> None:
        """A tensor that the adapter holds in full; an adapted embedding is saved as ``base_layer`` beside its LoRA."""
        name = self._named(re.sub(r"\.(modules_to_save|base_layer)\.", ".", key.removeprefix(_PREFIX)), key)
        shape, expected = self._file.slots[key].spec.shape, self._base.specs[name].shape
        if shape != expected:
            raise CheckpointError(f"{self.files[1]}: {key} has shape {shape}, the base's {name} has {expected}")
        self._full[name] = key

    def _named(self, name: str, key: str) -> str:
        """The base's tensor that an adapter's key is about."""
        if name not in self._base.specs:
            raise CheckpointError(f"{self.files[1]}: {key} adapts {name}, which {self._base.label} does not have")
        if self._base.specs[name].dtype not in MERGEABLE:
            raise CheckpointError(f"{self.files[1]}: {key} adapts {name}, which is {self._base.specs[name].dtype_name}")
        return name


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "IA3"):
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{path}: only LoRA and IA3 adapters can be merged, peft_type is {kind!r}")
    for option in ("use_dora", "layer_replication", "megatron_config"):
        if config.get(option):
            raise CheckpointError(f"{path}: adapters with {option} cannot be merged")
    return config


def _scale(config: Mapping[str, Any], path: Path, module: str, rank: int) -> float:
    """lora_alpha / r of one module; the file's own rank is what counts."""
    try:
        alpha = float(_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha")))
    except (TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{path}: lora_alpha or alpha_pattern of {module}: {error}") from None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_feedforward(config: Mapping[str, Any], module: str) -> bool:
    """A name or a list of names is a suffix of the module's path; a string is a pattern for all of it."""
    feedforward = config.get("feedforward_modules") or []
    if isinstance(feedforward, str):
        return re.fullmatch(feedforward, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in feedforward)
