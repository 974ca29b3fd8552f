"""PEFT adapters read as fine-tuned models: the base with LoRA or IA3 applied, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .adapter_config import WAY_OUT, AdapterConfig
from .adapter_layers import DECOMPOSED, Bias, Change, Ia3, Lora, fits, fits_ia3
from .adapter_orientation import Orientation, Target
from .architecture import Architecture
from .file_format import file_format
from .locate import ADAPTER_CONFIG, ADAPTER_WEIGHTS, display_name, entry, settings_in
from .pickled import PickledFile
from .prefixes import unwrapped
from .reader import Checkpoint
from .safetensors_file import SafetensorsFile
from .spec import MERGEABLE, TensorSpec

_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(weight|bias))?$")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?$")
_IA3 = re.compile(r"(.+)\.ia3_l$")
# A PeftModel's own state dict has the adapter's name in its keys, which save_pretrained() leaves out.
_ADAPTER_NAME = re.compile(
    r"\.(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector|ia3_l)\.(?!weight$|bias$)([^.]+)(?:\.(?:weight|bias))?$"
)
_BASE_LAYER = re.compile(r"\.base_layer(?=\.|$)")
_HELD_IN_FULL = re.compile(r"\.(modules_to_save|base_layer)\.")


class AdaptedCheckpoint(Checkpoint):
    """``base`` with a LoRA or IA3 adapter applied, as PEFT's ``merge_and_unload`` does, computed when it is read.

    LoRA: W + s B A with s = lora_alpha / r (/ sqrt(r) with ``use_rslora``), rank and alpha patterns, DoRA, trained and
    own biases, and the initialisations PiSSA and OLoRA included. IA3: W scaled along its outputs, or along its inputs
    for feed-forward modules; the bias of the former too. Tensors that the adapter holds in full (``modules_to_save``,
    trained biases) replace the base's. Adapted tensors are float32 (float64 where the base is), so a task vector keeps
    what a bfloat16 sum would round away; nothing but the tensor being read is ever held. ``base`` is shared, and stays
    open.

    A head that the base ties to its embeddings, and that the adapter leaves alone, keeps the base's values, as it does
    while the adapter is trained.

    Raises CheckpointError, naming the file, for other kinds of adapters and for tensors that do not fit the base.
    """

    widened = True

    def __init__(self, path: Path, base: Checkpoint, named: Callable[[str], str] = lambda name: name) -> None:
        self.path = self.directory = path
        weights = entry(path, next((name for name in ADAPTER_WEIGHTS if (path / name).exists()), ADAPTER_WEIGHTS[0]))
        self.files = (entry(path, ADAPTER_CONFIG), weights)
        settings = settings_in(path)
        self.config = AdapterConfig.read(self.files[0])
        self.label = str(path)
        self.name = display_name(path)
        self.base = base
        self._to_base = named
        self._file = _open(weights)
        self.identities = {**base.identities, **settings, weights: self._file.identity}
        self._keys = self._by_plain_key()
        self._stored = {key: self._file.specs[stored] for key, stored in self._keys.items()}
        if not self._stored:
            raise CheckpointError(f"{weights}: the adapter holds no tensors")
        self._full: dict[str, str] = {}  # tensor -> the adapter's key that replaces it, before any change
        self._changes: dict[str, Change] = {}
        self._stand_ins: dict[str, str] = {}  # tied names that the base does not store -> what it stores for them
        others = self._plan_lora() if self.config.kind == "LORA" else self._plan_ia3()
        for key in others:
            self._plan_replacement(key)
        self._keep_untouched_heads()
        self._set_specs()

    def read(self, name: str) -> Tensor:
        full, dtype = self._full.get(name), self.specs[name].dtype
        tensor = self.base.read(self._stand_ins.get(name, name)) if full is None else self._read(full)
        tensor = tensor.to(self.device(name))
        return self._changes[name].apply(tensor, self._read, dtype) if name in self._changes else tensor.to(dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        change = self._changes.get(name)
        if name in self._full or (change is not None and not (isinstance(change, Lora) and change.by_rows)):
            return super().read_rows(name, start, stop)
        rows = self.base.read_rows(self._stand_ins.get(name, name), start, stop)
        return rows if change is None else change.apply(rows, self._read, self.specs[name].dtype, slice(start, stop))

    def will_need(self, names: Sequence[str]) -> None:
        """What replaces the base's tensors: a merge fetches those anyway, and factors are small."""
        if isinstance(self._file, SafetensorsFile):
            for key in (self._full[name] for name in names if name in self._full):
                self._file.will_need(self._keys[key])

    def device(self, name: str) -> torch.device:
        name = self._stand_ins.get(name, name)
        return self.base.device(name) if name in self.base.specs else super().device(name)

    def _read(self, key: str) -> Tensor:
        return self._file.read(self._keys[key])

    def origin(self, name: str) -> str:
        touched = name in self._full or name in self._changes
        return str(self.files[1]) if touched else self.base.origin(self._stand_ins.get(name, name))

    @property
    def touched(self) -> Set[str]:
        """The tensors that the adapter changes or replaces."""
        return self._full.keys() | self._changes.keys()

    def close(self) -> None:
        self._full, self._changes = {}, {}

    def _find_architecture(self) -> Architecture | None:
        return self.base.architecture

    # LoRA

    def _plan_lora(self) -> list[str]:
        """Plan what LoRA changes; returns the keys that are not LoRA's."""
        layers: dict[str, dict[str, str]] = {}
        others = []
        for key in self._stored:
            found, magnitude = _LORA.match(key), _MAGNITUDE.match(key)
            if found is None and magnitude is None:
                others.append(key)
                continue
            module = self._module((found or magnitude).group(1))  # type: ignore[union-attr]
            part = "M" if found is None else found.group(3) + ("bias" if found.group(4) == "bias" else "")
            layer = layers.setdefault(module, {})
            if part in layer:
                raise CheckpointError(f"{self.files[1]}: {layer[part]} and {key} are for the same layer")
            layer[part] = key
            if found is not None and found.group(2):
                layer["embedding"] = "yes"
        for module, layer in layers.items():
            if not {"A", "B"} <= layer.keys():
                raise CheckpointError(f"{self.files[1]}: {module} has only one of lora_A and lora_B")
        targets = {module: self._lora_target(module, layer) for module, layer in layers.items()}
        matrices = [target for module, target in targets.items() if "embedding" not in layers[module]]
        orientation = Orientation(self.base, self.config.flag("fan_in_fan_out"), matrices)
        for module, layer in layers.items():
            self._plan_layer(module, layer, targets[module], orientation)
        return others

    def _lora_target(self, module: str, layer: Mapping[str, str]) -> Target:
        if f"{module}.in_proj_weight" in self.base.specs:
            raise CheckpointError(f"{self.files[1]}: {module} is a MultiheadAttention, not merged here; {WAY_OUT}")
        a, b = self._floating(layer["A"]), self._floating(layer["B"])
        if a.shape and not a.shape[0]:
            raise CheckpointError(f"{self.files[1]}: {module} has rank 0")
        name = self._named(f"{module}.weight", layer["A"])
        expected = self._base_spec(name).shape
        plain, turned = (fits(a, b, expected, turned=turned) for turned in (False, True))
        if "embedding" in layer:
            plain = False
        misfit = (
            f"{self.files[1]}: {module} has lora_A {a.shape} and lora_B {b.shape}, which do not make up the base's "
            f"{name} {expected}"
        )
        if not plain and not turned:
            raise CheckpointError(misfit)
        rank = self.config.rank(module)
        if rank is not None and rank != a.shape[0]:
            raise CheckpointError(
                f"{self.files[1]}: {module} has rank {a.shape[0]}, but {self.files[0].name} gives it rank {rank}"
            )
        return Target(name, plain, turned, misfit)

    def _plan_layer(self, module: str, layer: Mapping[str, str], target: Target, orientation: Orientation) -> None:
        rank = self._stored[layer["A"]].shape[0]
        scale = self.config.scale(module, rank)
        turned = "embedding" in layer or orientation.turned(target)
        initialisation = "" if "embedding" in layer else self.config.initialisation
        if initialisation and (len(self._base_spec(target.name).shape) != 2 or (turned and initialisation == "olora")):
            raise CheckpointError(f"{self.files[0]}: PEFT does not initialise {module} by {initialisation}")
        self._check_unused(layer)
        if self.config.flag("use_dora"):
            self._check_magnitude(module, layer, target.name, turned=turned)
        magnitude = layer["M"] if self.config.flag("use_dora") else ""
        lora = Lora(layer["A"], layer["B"], scale, turned, magnitude, initialisation)
        self._change(target.name, layer["A"], lora)
        if "Bbias" in layer:
            bias, key = self._named(f"{module}.bias", layer["Bbias"]), layer["Bbias"]
            if self._floating(key).shape != self._base_spec(bias).shape:
                raise CheckpointError(f"{self.files[1]}: {key} does not have the shape of the base's {bias}")
            self._change(bias, key, Bias(key, scale))

    def _check_unused(self, layer: Mapping[str, str]) -> None:
        """PEFT leaves these out where the config does not ask for them; then they were trained by something else."""
        for part, option in (("M", "use_dora"), ("Bbias", "lora_bias")):
            if part in layer and not self.config.flag(option):
                raise CheckpointError(f"{self.files[1]} holds {layer[part]}, but {self.files[0].name} has no {option}")

    def _check_magnitude(self, module: str, layer: Mapping[str, str], name: str, *, turned: bool) -> None:
        if "M" not in layer:
            raise CheckpointError(f"{self.files[1]}: {module} has no lora_magnitude_vector, but use_dora is set")
        outputs = self._base_spec(name).shape[1 if turned else 0]
        if self._floating(layer["M"]).numel != outputs:
            raise CheckpointError(f"{self.files[1]}: {layer['M']} does not have one value for each output of {name}")

    # IA3

    def _plan_ia3(self) -> list[str]:
        """Plan what IA3 changes; returns the keys that are not IA3's."""
        layers: dict[str, str] = {}
        others = []
        for key in self._stored:
            found = _IA3.match(key)
            if found is None:
                others.append(key)
            elif layers.setdefault(module := self._module(found.group(1)), key) != key:
                raise CheckpointError(f"{self.files[1]}: {layers[module]} and {key} are for the same layer")
        targets = {module: self._ia3_target(module, key) for module, key in layers.items()}
        orientation = Orientation(self.base, self.config.flag("fan_in_fan_out"), [*targets.values()])
        for module, key in layers.items():
            feedforward = self.config.is_feedforward(module)
            ia3 = Ia3(key, feedforward, orientation.turned(targets[module]))
            self._change(targets[module].name, key, ia3)
            bias = self._to_base(f"{module}.bias")
            # A feed-forward module's input is scaled, which its bias never meets.
            if not feedforward and bias in self.base.specs:
                self._change(bias, key, ia3)
        return others

    def _ia3_target(self, module: str, key: str) -> Target:
        name = self._named(f"{module}.weight", key)
        factors, expected = self._floating(key).shape, self._base_spec(name).shape
        feedforward = self.config.is_feedforward(module)
        plain = fits_ia3(factors, expected, feedforward=feedforward, turned=False)
        turned = len(expected) == 2 and fits_ia3(factors, expected, feedforward=feedforward, turned=True)
        misfit = f"{key} {factors} of {self.files[1]} does not scale the base's {name} {expected}"
        if not plain and not turned:
            raise CheckpointError(misfit)
        return Target(name, plain, turned, misfit)

    # Tensors held in full

    def _plan_replacement(self, key: str) -> None:
        """A tensor that the adapter holds in full; an adapted embedding is saved as ``base_layer`` beside its LoRA."""
        if re.search(r"\.(lora_|ia3_|token_adapter\.)", key):
            raise CheckpointError(f"{self.files[1]}: {key} is a kind of adapter weight that is not merged here")
        name = self._to_base(_HELD_IN_FULL.sub(".", key.removeprefix(_PREFIX)))
        if name in self._full:
            raise CheckpointError(f"{self.files[1]}: {self._full[name]} and {key} both replace {name}")
        if name in self._changes and ".base_layer." not in key:
            raise CheckpointError(f"{self.files[1]}: {key} replaces {name}, which the adapter also changes")
        if name in self.base.specs or name in self.base.absent_ties:
            spec, expected = self._stored[key], self._base_spec(self._named(name, key))
            if spec.shape != expected.shape:
                raise CheckpointError(
                    f"{self.files[1]}: {key} has shape {spec.shape}, the base's {name} has {expected.shape}"
                )
            self._floating(key)
        self._full[name] = key

    # Keys

    def _by_plain_key(self) -> dict[str, str]:
        """The keys of the file by what save_pretrained() calls them: without wrappers and the adapter's name."""
        specs = self._file.specs
        names = sorted({found.group(1) for key in specs if (found := _ADAPTER_NAME.search(key))})
        if len(names) > 1:
            raise CheckpointError(
                f"{self.files[1]} holds several adapters ({', '.join(names)}); write each to a directory of its own, "
                "as save_pretrained(NEW) of the PEFT model does"
            )
        plain: dict[str, str] = {}
        for key in specs:
            short = unwrapped(key)
            short = short.replace(f".{names[0]}.", ".").removesuffix(f".{names[0]}") if names else short
            if plain.setdefault(short, key) != key:
                raise CheckpointError(f"{self.files[1]}: {plain[short]} and {key} are for the same layer")
        return plain

    # Shared

    def _change(self, name: str, key: str, change: Change) -> None:
        if name in self._changes:
            raise CheckpointError(f"{self.files[1]}: {key} is a second adapter of {name}")
        self._changes[name] = change

    def _module(self, path: str) -> str:
        return _BASE_LAYER.sub("", path.removeprefix(_PREFIX))

    def _floating(self, key: str) -> TensorSpec:
        spec = self._stored[key]
        if spec.dtype not in MERGEABLE:
            raise CheckpointError(f"{self.files[1]}: {key} is {spec.dtype_name}, not floating point")
        return spec

    def _named(self, name: str, key: str) -> str:
        """The base's tensor that an adapter's key is about."""
        name = self._to_base(name)
        if name not in self.base.specs and name not in self.base.absent_ties:
            longer = next((other for other in self.base.specs if other.endswith(f".{name}")), None)
            shorter = next((other for other in self.base.specs if name.endswith(f".{other}")), None)
            change = ("", longer[: -len(name)]) if longer else (name[: -len(shorter)], "") if shorter else None
            advice = f"; rename {change[0]!r} to {change[1]!r} (--rename '{'='.join(change)}')" if change else ""
            raise CheckpointError(
                f"{self.files[1]}: {key} adapts {name}, which {self.base.label} does not have{advice}"
            )
        if self._base_spec(name).dtype not in MERGEABLE:
            raise CheckpointError(f"{self.files[1]}: {key} adapts {name}, which is {self._base_spec(name).dtype_name}")
        return name

    def _base_spec(self, name: str) -> TensorSpec:
        if name in self.base.specs:
            return self.base.specs[name]
        first = self.base.specs[self.base.absent_ties[name]]
        return TensorSpec(name, first.shape, first.dtype)

    def _keep_untouched_heads(self) -> None:
        """Second names of what the adapter changes keep the base's values; PEFT stores those that it changes, too."""
        touched = self.touched
        ties = {**self.base.tied, **(self.base.absent_ties if self._touches_embeddings(touched) else {})}
        self.tied = {}
        for second, first in ties.items():
            changed = second in touched or first in touched
            if changed and second not in self.base.specs:
                self._stand_ins[second] = first
            elif not changed and second in self.base.specs:
                self.tied[second] = first

    def _touches_embeddings(self, touched: Set[str]) -> bool:
        """Whether the adapter changes something that transformers may tie: asked before transformers is imported."""
        return any(
            name not in self.base.specs or (name in self._full and len(self.base.specs[name].shape) > 1)
            for name in touched
        ) or any(".lora_embedding_" in key for key in self._stored)

    def _set_specs(self) -> None:
        base = dict(self.base.specs)
        base |= {name: self._base_spec(name) for name in self._stand_ins}
        base |= {name: self._stored[key] for name, key in self._full.items() if name not in base}
        self.specs = {
            name: TensorSpec(name, spec.shape, _wide(spec.dtype) if name in self.touched else spec.dtype)
            for name, spec in sorted(base.items())
        }
        self.made = {**self.base.made, **{name: self._read_bytes(name) for name in self.touched}}

    def _read_bytes(self, name: str) -> int:
        """What reading a tensor that the adapter touches takes: itself, and what is taken out of it or the base's."""
        change, source = self._changes.get(name), self._stand_ins.get(name, name)
        itself = self.specs[name].nbytes
        if isinstance(change, Lora) and change.initialisation:
            itself *= DECOMPOSED
        return itself + (0 if name in self._full else self.base.made.get(source, 0))


def _open(path: Path) -> SafetensorsFile | PickledFile:
    return SafetensorsFile(path) if file_format(path) == "safetensors" else PickledFile(path)


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype not in MERGEABLE:
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32
