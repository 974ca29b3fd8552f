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
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """Entries that a file's tensor and a module's have in common: a strided view of either, both contiguous."""

    shape: tuple[int, ...]
    file: str
    file_offset: int
    file_strides: tuple[int, ...]
    module: str
    offset: int
    strides: tuple[int, ...]

    def of_module(self, tensor: Tensor) -> Tensor:
        """The piece, as a view of the module's tensor."""
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)

    def of_file(self, tensor: Tensor) -> Tensor:
        """The piece, as a view of the file's tensor."""
        return tensor.as_strided(self.shape, self.file_strides, tensor.storage_offset() + self.file_offset)


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
        return pieces[0].file if whole and pieces[0].strides == pieces[0].file_strides else None

    def is_view(self, name: str) -> bool:
        """Whether a tensor of files is a view of one of the module's."""
        first, *others = self.pieces[name]
        return not others and (first.shape, first.file_strides) == (self.files[name], _strides(self.files[name]))

    def file_tensor(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """A tensor as files hold it: a view of the module's where it is one piece, else put together."""
        pieces = self.pieces[name]
        if self.is_view(name):
            return pieces[0].of_module(read(pieces[0].module).contiguous())
        out = read(pieces[0].module).new_empty(self.files[name])
        for piece in pieces:
            piece.of_file(out).copy_(piece.of_module(read(piece.module).contiguous()))
        return out

    def module_tensor(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the module, from the tensors of files."""
        file = self.file_name(name)
        if file is not None:
            return read(file).reshape(self.shapes[name])
        out = read(self.module[name][0].file).new_empty(self.shapes[name])
        for piece in self.module[name]:
            piece.of_module(out).copy_(piece.of_file(read(piece.file).contiguous()))
        return out


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a transformers model's files; None for other modules, and where it is the module's own.

    It is the one that a new model is saved in, whatever file ``module`` was loaded from. Raises CheckpointError where
    transformers' conversion cannot be followed, so that nothing is merged under other names without a word.
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
        except Exception as error:  # conversions are code of any kind: one without a reverse, or that needs values
            raise _not_followed(module, f"{type(error).__name__}: {error}") from error
    modules = {_storage(tensor): name for name, tensor in traced.items()}
    pieces = []
    for name, tensor in files.items():
        found = recorder.pieces(tensor, modules)
        if found is None:
            raise _not_followed(module, f"{name} is more than parts of the module's tensors")
        pieces += [replace(piece, file=name) for piece in found]
    layout = Layout(_shapes(files), _shapes(traced), pieces)
    covered = {name: sum(math.prod(piece.shape) for piece in parts) for name, parts in layout.module.items()}
    for name, tensor in traced.items():
        if covered.get(name, 0) != tensor.numel():
            raise _not_followed(module, f"files do not hold all of {name}")
    return None if layout.files == layout.shapes and all(layout.file_name(n) == n for n in traced) else layout


def _not_followed(module: nn.Module, reason: str) -> CheckpointError:
    return CheckpointError(
        f"how files hold a {type(module).__name__} cannot be told from transformers' conversion ({reason}); pass state "
        "dicts of all models, as model.state_dict() returns them, which are merged in the module's layout"
    )


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
        renamed, _ = rename_source_key(name, renamings, [], module.base_model_prefix, held)
        return renamed if renamed in held else name

    return loaded


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, dtype=torch.float32, device="meta").stride()


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
    """Keeps views views, and notes what new tensors are put together from."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor]]]] = {}  # storage -> (tensor, [(box, source)])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone, torch.clone):
            return args[0]
        out = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate, torch.stack):
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0) % out.ndim
            boxes, position = [], 0
            for part in args[0]:
                part = part.unsqueeze(dim) if func is torch.stack else part
                boxes.append((out.narrow(dim, position, part.shape[dim]), part))
                position += part.shape[dim]
            self._made[_storage(out)] = out, boxes
        elif func in (Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten) and _storage(out) != _storage(
            args[0]
        ):
            self._made[_storage(out)] = out, [(out.view(args[0].shape), args[0])]
        return out

    def pieces(self, tensor: Tensor, modules: Mapping[int, str]) -> list[Piece] | None:
        """What a tensor without data consists of; None if it is more than views of modules' tensors put together."""
        shape, own = tuple(tensor.shape), _strides(tuple(tensor.shape))
        name = modules.get(_storage(tensor))
        if name is not None:
            return [Piece(shape, "", 0, own, name, int(tensor.storage_offset()), tensor.stride())]
        made, boxes = self._made.get(_storage(tensor), (tensor, []))
        if not boxes or made.numel() != tensor.numel():
            return None
        placed: list[Piece | None] = []
        nothing: list[Piece | None] = [None]
        for box, source in boxes:
            within = list(zip(box.shape, _strides(tuple(box.shape)), box.stride(), strict=True))
            for piece in self.pieces(source, modules) or nothing:
                inside = piece and _moved(piece, within, int(box.storage_offset()))
                placed.append(inside and _moved(inside, zip(shape, tensor.stride(), own, strict=True)))
        found = [piece for piece in placed if piece is not None]
        return found if len(found) == len(placed) and found else None


def _moved(piece: Piece, digits: Iterable[tuple[int, int, int]], shift: int = 0) -> Piece | None:
    """A piece of a file's tensor whose entries are in another order: None if it is no strided view of that.

    ``digits`` are the size, the old and the new stride of each dimension in which positions are counted.
    """
    counted = sorted((digit for digit in digits if digit[0] > 1), key=lambda digit: -digit[1])
    if any(outer[1] != size * stride for outer, (size, stride, _) in pairwise(counted)):
        return None
    reached, rest, offset = {}, piece.file_offset, shift
    for _, old, new in counted:
        reached[old], rest = divmod(rest, old)
        offset += reached[old] * new
    dims: list[tuple[int, int, int]] = []  # size, stride in the file, stride in the module
    for size, stride, inside in reversed(list(zip(piece.shape, piece.file_strides, piece.strides, strict=True))):
        if size < 2:
            dims.append((size, 1, inside))
        while size > 1:
            radix, old, new = next((digit for digit in counted if digit[1] <= stride), (0, 1, 1))
            count = min(size, radix * old // stride)
            if not count or stride % old or size % count:
                return None
            reached[old] += (count - 1) * (stride // old)
            if reached[old] >= radix:
                return None
            dims.append((count, stride // old * new, inside))
            size, stride, inside = size // count, stride * count, inside * count
    shape, strides, module_strides = zip(*reversed(dims), strict=True) if dims else ((), (), ())
    return replace(piece, shape=shape, file_offset=offset, file_strides=strides, strides=module_strides)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
