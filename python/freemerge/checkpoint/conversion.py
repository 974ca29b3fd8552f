"""Where transformers keeps a model's tensors in memory, and where in its files: names, fused experts, projections.

transformers 5 loads the separate experts of a file into one stacked parameter, splits fused projections, and renames;
it saves by the reverse. Its own conversion is followed here on tensors without data, which record where each part
comes from, so nothing about single architectures is written down.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Piece:
    """A box of a file's tensor, starting at ``start``, that is a strided view of a module's tensor."""

    file: str
    start: tuple[int, ...]
    module: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of_module(self, tensor: Tensor) -> Tensor:
        """The piece, as a view of the (contiguous) module's tensor."""
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)

    def of_file(self, tensor: Tensor) -> Tensor:
        """The piece, as a view of the file's tensor."""
        for dim, (start, size) in enumerate(zip(self.start, self.shape, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor


class Layout:
    """How the tensors of a module and of its files belong together.

    Attributes:
        files: the shape of each tensor in files.
        pieces: for each tensor in files, the parts of the module's tensors that it consists of.
        shapes: the shape of each tensor of the module.
        module: for each tensor of the module, the pieces that it consists of.
    """

    def __init__(
        self, files: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], pieces: Iterable[Piece]
    ) -> None:
        self.files, self.shapes = dict(files), dict(shapes)
        self.pieces: dict[str, list[Piece]] = {}
        self.module: dict[str, list[Piece]] = {}
        for piece in pieces:
            self.pieces.setdefault(piece.file, []).append(piece)
            self.module.setdefault(piece.module, []).append(piece)

    def file_name(self, name: str) -> str | None:
        """What files call a tensor that they hold as the module does; None for one that they hold otherwise."""
        pieces = self.module.get(name, [])
        whole = len(pieces) == 1 and len(self.pieces[pieces[0].file]) == 1
        return pieces[0].file if whole and pieces[0].strides == _strides(self.files[pieces[0].file]) else None

    def file_tensor(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """A tensor as files hold it: a view of the module's where it is one piece, else put together."""
        pieces = self.pieces[name]
        if len(pieces) == 1 and pieces[0].shape == self.files[name]:
            return pieces[0].of_module(read(pieces[0].module).contiguous())
        out = read(pieces[0].module).new_empty(self.files[name])
        for piece in pieces:
            piece.of_file(out).copy_(piece.of_module(read(piece.module).contiguous()))
        return out

    def module_tensor(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the module, from the tensors of files."""
        file = self.file_name(name)
        if file is not None:
            return read(file)
        out = read(self.module[name][0].file).new_empty(self.shapes[name])
        for piece in self.module[name]:
            piece.of_module(out).copy_(piece.of_file(read(piece.file)))
        return out


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a transformers model's files; None for other modules, and where it is the module's own.

    It is the one that a new model is saved in, whatever file ``module`` was loaded from.
    """
    conversions = _conversions(module)
    if not conversions:
        return None
    from transformers.core_model_loading import revert_weight_conversion

    traced = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in module.state_dict().items()
    }
    model: Any = SimpleNamespace(
        config=module.config, get_parameter=module.get_parameter, _weight_conversions=conversions
    )
    with _Recorder() as recorder:
        try:
            files = revert_weight_conversion(model, dict(traced))
        except Exception:  # a conversion that has no reverse, or needs values: transformers could not save it either
            return None
    return _layout(files, traced, recorder)


def _layout(files: Mapping[str, Tensor], traced: Mapping[str, Tensor], recorder: _Recorder) -> Layout | None:
    """The layout that a reversed conversion made; None if it is more than names and pieces, or nothing at all."""
    modules = {_storage(tensor): name for name, tensor in traced.items()}
    pieces = []
    for name, tensor in files.items():
        found = recorder.pieces(tensor, modules)
        if found is None:
            return None
        pieces += [replace(piece, file=name) for piece in found]
    layout = Layout(_shapes(files), _shapes(traced), pieces)
    covered = {name: sum(math.prod(piece.shape) for piece in parts) for name, parts in layout.module.items()}
    if covered != {name: tensor.numel() for name, tensor in traced.items()}:
        return None
    return None if all(layout.file_name(name) == name for name in traced) else layout


def loaded_names(module: nn.Module) -> Callable[[str], str]:
    """What transformers calls a tensor of a file once it is loaded: names of older versions, with the model's prefix.

    A name that it does not know stays as it is.
    """
    conversions = _conversions(module, legacy=True)
    if not conversions:
        return lambda name: name
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    held = module.state_dict()
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]

    def loaded(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, [], module.base_model_prefix, held)  # type: ignore[arg-type]
        return renamed if renamed in held else name

    return loaded


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _conversions(module: nn.Module, *, legacy: bool = False) -> list[Any]:
    """transformers' conversions of a model's class, none for other modules and for versions before 5.

    Those of names in files of older versions are among them if ``legacy``.
    """
    if not any(base.__module__.startswith("transformers.") for base in type(module).__mro__):
        return []
    if importlib.util.find_spec("transformers.conversion_mapping") is None:
        return []
    from transformers import core_model_loading
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return []
    if legacy:
        return list(get_model_conversion_mapping(module))
    # Whether files have a prefix that the module lacks is known only of the file that it was loaded from.
    prefixes = getattr(core_model_loading, "PrefixChange", ())
    conversions = get_model_conversion_mapping(module, add_legacy=False)
    return [conversion for conversion in conversions if not isinstance(conversion, prefixes)]


class _Recorder(TorchFunctionMode):
    """Keeps views views, and notes which parts a concatenation has."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[int, tuple[Tensor, list[tuple[tuple[int, ...], Tensor]]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:
            return args[0]
        out = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.stack):
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0) % out.ndim
            parts, position = [], 0
            for part in args[0]:
                part = part.unsqueeze(dim) if func is torch.stack else part
                parts.append((tuple(position if i == dim else 0 for i in range(out.ndim)), part))
                position += part.shape[dim]
            self.parts[_storage(out)] = (out, parts)
        return out

    def pieces(self, tensor: Tensor, modules: Mapping[int, str]) -> list[Piece] | None:
        """What a tensor without data consists of; None if it is more than a concatenation of views."""
        name = modules.get(_storage(tensor))
        if name is not None:
            start = (0,) * tensor.ndim
            return [Piece("", start, name, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())]
        whole, parts = self.parts.get(_storage(tensor), (None, []))
        if whole is None or (whole.shape, whole.stride(), 0) != (
            tensor.shape,
            tensor.stride(),
            tensor.storage_offset(),
        ):
            return None
        found = []
        for start, part in parts:
            inner = self.pieces(part, modules)
            if inner is None:
                return None
            found += [replace(piece, start=tuple(map(sum, zip(start, piece.start, strict=True)))) for piece in inner]
        return found


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
