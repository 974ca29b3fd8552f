"""Where the entries of experts lie in a model: under other names, or inside of stacked and fused tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backends.sparse import SparseVector
from ..checkpoint.conversion import Layout, Piece, layout_of, loaded_names
from ..checkpoint.prefixes import inner_module, unwrapped
from .values import ExpertTensor, SparseTensor
from .values.base import Seen


@dataclass(frozen=True)
class Part:
    """What one tensor of an expert contributes to a tensor of the model: all of it, or the entries of a piece."""

    entry: str
    piece: Piece | None = None


class Placement:
    """The names of a model's tensors, and where files keep their values.

    Experts made from files have the files' names, those of a module may have what wrappers add. ``layout`` is looked
    up when a name is not the model's own.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        self._model = model
        if isinstance(model, nn.Module):
            held = [name for name, _ in model.named_parameters(remove_duplicate=False)]
            held += [name for name, _ in model.named_buffers(remove_duplicate=False)]
        else:
            held = list(model)
        self.names = set(held)
        self._names = {unwrapped(name): name for name in held} | {name: name for name in held}
        self._layout: Layout | None = None
        self._asked = False
        self._loaded_name: Callable[[str], str] | None = None

    @property
    def layout(self) -> Layout | None:
        if not self._asked:
            self._asked = True
            self._layout = layout_of(inner_module(self._model)[1]) if isinstance(self._model, nn.Module) else None
        return self._layout

    def _loaded(self, entry: str) -> str | None:
        """The name of what transformers loads from files of an older version, or of a model without this one's head."""
        if not isinstance(self._model, nn.Module):
            return None
        if self._loaded_name is None:
            self._loaded_name = loaded_names(inner_module(self._model)[1])
        return self._names.get(self._loaded_name(unwrapped(entry)))

    def parts(self, entries: Mapping[str, ExpertTensor] | Mapping[str, Tensor]) -> dict[str, list[Part]]:
        """For each tensor of the model that an expert changes, the parts that it is changed by.

        Raises KeyError for a name that the model has in no form, ValueError for a shape that is not the layout's.
        """
        placed: dict[str, list[Part]] = {}
        for entry, tensor in entries.items():
            name = self._names.get(entry) or self._names.get(unwrapped(entry)) or self._loaded(entry)
            if name is not None:
                placed.setdefault(name, []).append(Part(entry))
                continue
            pieces = self.layout.pieces.get(unwrapped(entry)) if self.layout is not None else None
            if not pieces or self.layout is None:
                raise KeyError(entry)
            if self.layout.files[unwrapped(entry)] != tensor.shape:
                expected = self.layout.files[unwrapped(entry)]
                raise ValueError(f"{entry!r} has shape {tensor.shape}, files of the model hold {expected}")
            for piece in pieces:
                placed.setdefault(self._names[piece.module], []).append(Part(entry, piece))
        return dict(sorted(placed.items()))


def gathered(parts: list[Part], entries: Mapping[str, SparseTensor]) -> SparseVector:
    """The entries of one tensor of a model, from the parts of an expert's tensors."""
    if len(parts) == 1 and parts[0].piece is None:
        return entries[parts[0].entry].sparse()
    indices, values = [], []
    for part in parts:
        sparse = entries[part.entry].sparse()
        found, inside = _in_module(sparse.indices.long(), part.piece)
        indices.append(found)
        values.append(sparse.values[inside])
    joined = torch.cat(indices)
    order = joined.argsort()
    dtype = torch.int32 if not len(joined) or int(joined.max()) < 2**31 else torch.int64
    return SparseVector(joined[order].to(dtype), torch.cat(values)[order])


def gathered_dense(
    parts: list[Part], entries: Mapping[str, ExpertTensor], like: Tensor, seen: Mapping[str, Seen]
) -> Tensor:
    """What is added to one tensor of a model, float32 on its device, from the parts of an expert's tensors.

    ``seen``: by entry, what codings that are relative to the merged task vector have to know of it (:func:`seen_by`).
    """

    def dense_of(entry: str) -> Tensor:
        tensor = entries[entry]
        return tensor.dense(like.device, seen[entry]) if tensor.relative else tensor.dense(like.device)

    dense = {part.entry: dense_of(part.entry) for part in parts}
    if len(parts) == 1 and parts[0].piece is None:
        return dense[parts[0].entry]
    total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for part in parts:
        if part.piece is None:
            total += dense[part.entry]
        else:
            part.piece.of_module(total).copy_(part.piece.of_file(dense[part.entry]))
    return total


def seen_by(part: Part, entry: ExpertTensor, vector: Tensor) -> Seen:
    """What an entry's coding has to know of the theta_m - theta_0 of the tensor that it is a part of."""
    if part.piece is None:
        return entry.seen(vector)
    # As the file has it; where a tensor of the file is in several of the model, the rest of it is not looked at.
    whole = torch.zeros(entry.shape, dtype=torch.float32, device=vector.device)
    part.piece.of_file(whole).copy_(part.piece.of_module(vector.contiguous()))
    return entry.seen(whole)


def _in_module(indices: Tensor, piece: Piece | None) -> tuple[Tensor, Tensor]:
    """Flat positions in the module's tensor, and which of the entries they are of."""
    if piece is None:
        return indices, torch.ones(len(indices), dtype=torch.bool, device=indices.device)
    place, rest = torch.full_like(indices, piece.offset), indices - piece.file_offset
    inside = rest >= 0
    dims = zip(piece.file_strides, piece.shape, piece.strides, strict=True)
    for stride, size, target in sorted((dim for dim in dims if dim[1] != 1), reverse=True):
        position = rest.div(stride, rounding_mode="floor")
        rest = rest - position * stride
        inside &= position < size
        place += position * target
    inside &= rest == 0
    return place[inside], inside
