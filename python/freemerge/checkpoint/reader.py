"""Reading checkpoints: one interface over safetensors, torch files, state dicts and modules."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Union

import torch

from ..arguments import path_of
from ..errors import ArgumentError, CheckpointError, counted
from ..lazy import cached_property
from .architecture import Architecture, built_from_config, read_config, second_names
from .containers import SEPARATOR, split_key, state_dict_in
from .file_format import file_format
from .hub_cache import local_path
from .locate import Located, display_name, locate
from .pickled import PickledFile
from .prefixes import counters, inner_module
from .regular_file import Identity
from .safetensors_file import SafetensorsFile
from .spec import TensorSpec
from .state_dict import dense_tensor, dense_tensors, is_extra, left_out, specs_of, tied_names

Source = Union[str, "os.PathLike[str]", Mapping[str, torch.Tensor], torch.nn.Module]


class Checkpoint(ABC):
    """The tensors of one model, by name. Open one with :meth:`open`; it is also a context manager.

    Attributes:
        specs: every tensor without its values, sorted by name.
        tied: names that are a second name of another tensor's memory, each with the name that comes first. They are
            in ``specs`` too. Only sources that can tell have any (torch files, state dicts, modules).
        path: what was opened, or None if it was in memory.
        directory: the model directory, if one was opened: config and tokenizer lie there.
        files: the weight files, for hashing; none if in memory.
        identities: what these were when they were opened, and so every other file that says what the tensors are: the
            JSON files beside them, and the files of an adapter's base.
        module: the module that was opened, if it was one.
        dequantised: whether some weights are stored in float8 and shown in float32.
        widened: whether dtypes are wider than what is stored, so that they say nothing about the files.
        made: the bytes of memory that :meth:`read` takes, beside the source's own, for each tensor that it computes.
        copies: names in ``specs`` that are known to hold a copy of another tensor, each with the name of that.
        set_aside: what of the source is left out, in sentences.
        metadata: what the headers of the files say about the model, beside ``format``, and not about their bytes.
        label: what to call this model in messages.
        name: what to call it in a manifest: no path of this machine in it, and the key behind ``::`` if one was given.
    """

    specs: dict[str, TensorSpec]
    tied: dict[str, str]
    made: Mapping[str, int] = {}
    copies: Mapping[str, str] = {}
    set_aside: tuple[str, ...] = ()
    dequantised: bool = False
    widened: bool = False
    path: Path | None = None
    directory: Path | None = None
    files: tuple[Path, ...] = ()
    identities: Mapping[Path, Identity] = {}
    metadata: Mapping[str, str] = {}
    module: torch.nn.Module | None = None
    label: str
    name: str

    @staticmethod
    def open(source: Source | Checkpoint, *, argument: str = "") -> Checkpoint:
        """Open a model directory, a weight file, an ``*.index.json``, a state dict, a module, or a Hub id in the cache.

        ``FILE::key`` is a state dict among several in one torch file.
        ``argument`` is what messages call a source in memory. Headers are read and checked here; tensors are read on
        demand. Raises CheckpointError naming the file.
        """
        if isinstance(source, Checkpoint):
            return source
        if isinstance(source, torch.nn.Module):
            prefix, inner = inner_module(source)
            opened = _InMemory(inner.state_dict(keep_vars=True), f"in-memory {type(inner).__name__}", argument)
            opened.module = inner
            opened.tied = tied_names(opened.state, second_names(inner))
            if inner is not source:
                whole = source.state_dict()
                opened.wrapped = prefix, {n: t for n, t in whole.items() if not n.startswith(prefix)}
            return opened
        if isinstance(source, Mapping):
            name = "in-memory state dict"
            state = state_dict_in(source, f"{argument} ({name})" if argument else name)
            return _InMemory(state, name, argument) if isinstance(state, dict) else _Lazy(state, name, argument)
        if isinstance(source, (str, os.PathLike)):
            path_of(argument or "a model", source)
            file, key = split_key(os.fspath(source))
            path = local_path(file)
            located = locate(path)
            formats = {file_format(file) for file in located.files}
            if len(formats) > 1:
                raise CheckpointError(f"{path}: some of its files are torch files, others safetensors")
            in_torch = "pickled" in formats
            if key and (len(located.files) > 1 or not in_torch):
                raise CheckpointError(f"{source}: {file} is no torch file, so there is no {key!r} in it")
            return _Pickled(path, located, key) if in_torch else _Safetensors(path, located)
        raise ArgumentError(
            f"{argument or 'a model'} must be a path, a state dict or a module, got {type(source).__name__}"
        )

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype, for reading only: it may share memory with its source.

        Tensors of files are memory maps where possible; their pages are let go when the tensor is dropped, so hold
        only the tensors at work. Safe to call from several threads.
        """

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` of a tensor along its first dimension, for reading only."""
        shape = self.specs[name].shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise ArgumentError(f"{name} has shape {shape}: there are no rows {start}:{stop}")
        return self.read(name)[start:stop]

    def read_flat(self, names: Sequence[str]) -> torch.Tensor:
        """Tensors of one dtype end to end, as a vector, for reading only: one read where a file holds them so."""
        return torch.cat([self.read(name).reshape(-1) for name in names])

    def will_need(self, names: Sequence[str]) -> None:  # noqa: B027  sources in memory have nothing to do
        """Tell the system that tensors are going to be read soon, so that it fetches them from the disk meanwhile."""

    def device(self, name: str) -> torch.device:
        """Where :meth:`read` returns a tensor: files are read on the CPU."""
        return torch.device("cpu")

    def origin(self, name: str) -> str:
        """Where a tensor comes from, for messages: its file, or the label of a source in memory."""
        return self.label

    @cached_property
    def architecture(self) -> Architecture | None:
        """What is known about the model beyond its tensors; None for a state dict, or an unknown config.json.

        The first use may import transformers, which takes seconds.
        """
        return self._find_architecture()

    @cached_property
    def absent_ties(self) -> dict[str, str]:
        """Second names of tied tensors that the model has and this checkpoint does not store, with the first names."""
        ties = {} if self.architecture is None else self.architecture.ties()
        return {second: first for second, first in ties.items() if second not in self.specs and first in self.specs}

    @cached_property
    def buffers(self) -> set[str]:
        """Names of the tensors that are known not to be parameters: those of a module."""
        return self.architecture.buffers() if self.module is not None and self.architecture is not None else set()

    def aliases(self, name: str) -> tuple[str, ...]:
        """What else a tensor is called: where it lies in the module that was opened."""
        return ()

    def _find_architecture(self) -> Architecture | None:
        return None if self.module is None else Architecture(self.module)

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors named and shaped as :attr:`specs` says, as what was opened names and shapes them."""
        return dict(sorted(tensors.items()))

    @abstractmethod
    def close(self) -> None:
        """Let go of the source: no more reads. Tensors already read stay valid."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.label}: {counted(len(self.specs), 'tensor')}>"


class _InMemory(Checkpoint):
    wrapped: tuple[str, Mapping[str, torch.Tensor]] = ("", {})  # the prefix of a wrapper, and what it holds itself

    def __init__(self, state: Mapping[str, torch.Tensor], name: str, argument: str) -> None:
        self.name = name
        self.label = f"{argument} ({name})" if argument else name
        self.state = dense_tensors(self.label, state)
        self.set_aside = left_out(self.label, [str(name) for name in state if name not in self.state])
        self.specs = specs_of(self.state)
        self.tied = tied_names(self.state)

    def read(self, name: str) -> torch.Tensor:
        return self.state[name]

    def device(self, name: str) -> torch.device:
        return self.state[name].device

    def aliases(self, name: str) -> tuple[str, ...]:
        return (self.wrapped[0] + name,) if self.wrapped[0] else ()

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        prefix, others = self.wrapped
        held = {name: tensor.detach().clone() for name, tensor in others.items()}
        return super().restored({prefix + name: tensor for name, tensor in tensors.items()} | held)

    def close(self) -> None:
        self.state = {}


class _Lazy(Checkpoint):
    """A mapping that may make a tensor when it is asked for one: every use asks again, and none is held."""

    def __init__(self, state: Mapping[str, torch.Tensor], name: str, argument: str) -> None:
        self.name = name
        self.label = f"{argument} ({name})" if argument else name
        self._state, self._lock = state, Lock()
        self._devices: dict[str, torch.device] = {}
        specs: dict[str, TensorSpec] = {}
        made: dict[str, weakref.ref[torch.UntypedStorage]] = {}
        aside = counters([str(key) for key in state])
        for key in state:
            value = self._value(key)
            if key in aside or is_extra(key, value):
                aside.add(key)
                continue
            tensor = dense_tensor(self.label, key, value)
            specs |= specs_of({key: tensor})
            self._devices[key] = tensor.device
            made[key] = weakref.ref(tensor.untyped_storage())
            del tensor, value
        self.set_aside = left_out(self.label, [key for key in state if key in aside])
        self.specs = dict(sorted(specs.items()))
        # Memory that is still there now is the mapping's own, so that equal addresses mean ties.
        self.tied = tied_names({key: self.read(key) for key, storage in made.items() if storage() is not None})
        self.made = {key: self.specs[key].nbytes for key, storage in made.items() if storage() is None}

    def read(self, name: str) -> torch.Tensor:
        tensor = dense_tensor(self.label, name, self._value(name))
        if specs_of({name: tensor})[name] != self.specs[name]:
            raise CheckpointError(f"{self.label}: tensor {name!r} has changed while it was merged")
        return tensor

    def _value(self, name: str) -> object:
        with self._lock:  # the mapping says nothing about threads
            return self._state[name]

    def device(self, name: str) -> torch.device:
        return self._devices[name]

    def close(self) -> None:
        self._state = {}


class _OnDisk(Checkpoint):
    _files: Mapping[str, SafetensorsFile | PickledFile]

    def __init__(self, path: Path, located: Located) -> None:
        self.path = path
        self.directory = located.directory
        self.files = located.files
        self.label = str(path)
        self.name = display_name(path)
        self.tied = {}
        if located.stray:
            self.set_aside = (f"{path}: the index does not name {', '.join(located.stray[:3])}, which is not read",)

    def origin(self, name: str) -> str:
        return str(self._files[name].path)

    def _find_architecture(self) -> Architecture | None:
        return built_from_config(read_config(self.directory), len(self.specs))

    def read(self, name: str) -> torch.Tensor:
        return self._files[name].read(name)

    def close(self) -> None:
        self._files = {}

    def _assign(self, files: Mapping[Path, SafetensorsFile | PickledFile], located: Located) -> None:
        """Note which file holds which tensor: every tensor in exactly one file, and where the index says."""
        where: dict[str, Path] = {}
        for file, content in files.items():
            for name in content.specs:
                if name in where:
                    raise CheckpointError(f"{self.path}: tensor {name!r} is in both {where[name].name} and {file.name}")
                where[name] = file
        if located.weight_map is not None:
            for name, file in located.weight_map.items():
                if where.get(name) != file:
                    raise CheckpointError(f"{located.index}: tensor {name!r} is not in {file.name}")
            for name, file in where.items():
                if name not in located.weight_map:
                    raise CheckpointError(f"{located.index}: tensor {name!r} of {file.name} is not listed")
        self.identities = {**located.settings, **{file: content.identity for file, content in files.items()}}
        self._files = {name: files[where[name]] for name in sorted(where)}
        self.specs = {name: file.specs[name] for name, file in self._files.items()}


class _Safetensors(_OnDisk):
    _files: Mapping[str, SafetensorsFile]

    def __init__(self, path: Path, located: Located) -> None:
        super().__init__(path, located)
        files = {file: SafetensorsFile(file) for file in located.files}
        self._assign(files, located)
        said = {key: value for file in files.values() for key, value in file.metadata.items()}
        self.metadata = {key: value for key, value in said.items() if key != "format" and "hash" not in key}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._files[name].read_rows(name, start, stop)

    def will_need(self, names: Sequence[str]) -> None:
        for name in names:
            self._files[name].will_need(name)

    def read_flat(self, names: Sequence[str]) -> torch.Tensor:
        flat = self._files[names[0]].read_flat(names)
        return super().read_flat(names) if flat is None else flat


class _Pickled(_OnDisk):
    _files: Mapping[str, PickledFile]

    def __init__(self, path: Path, located: Located, key: str = "") -> None:
        super().__init__(path, located)
        self._place = f"{SEPARATOR}{key}" if key else ""  # in the only file
        self.label += self._place
        self.name += self._place
        files = {file: PickledFile(file, key) for file in located.files}
        self._assign(files, located)
        self.tied = {name: first for file in files.values() for name, first in file.tied.items()}
        self._last = files[located.files[0]]
        self.set_aside += left_out(self.label, [name for file in files.values() for name in file.left_out])

    def origin(self, name: str) -> str:
        return super().origin(name) + self._place

    def read(self, name: str) -> torch.Tensor:
        file = self._files[name]
        if file is not self._last:
            self._last.release()
            self._last = file
        return file.read(name)
