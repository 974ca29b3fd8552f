"""Do tensors share memory? In-place work must not meet an element twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_PERIODS = 4  # strides that are tried for telling interleaved tensors apart


def internal_overlap(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two indices of such a tensor may address one element (expanded tensors, sliding windows)."""
    reach = 0  # of the faster axes, in elements
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of memory from the first to the last entry of such a tensor, which has one at least."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True))


def overlapping_pair(tensors: Sequence[torch.Tensor]) -> tuple[int, int] | None:
    """Indices of two tensors that share at least one element, if any."""
    return next(overlapping_pairs(tensors), None)


def overlapping_pairs(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Indices of every two."""
    layouts: dict[int, npt.NDArray[np.void]] = {}

    def layout(i: int) -> npt.NDArray[np.void]:
        if i not in layouts:
            layouts[i] = np.asarray(_Layout(tensors[i]))
        return layouts[i]

    for spans in _clusters(tensors):
        seen = set()
        for one, other in _meeting(spans):
            pair = min(one.index, other.index), max(one.index, other.index)
            if one.begin < other.end and other.begin < one.end and pair not in seen:
                seen.add(pair)
                if np.shares_memory(layout(pair[0]), layout(pair[1])):
                    yield pair


@dataclass(frozen=True, slots=True)
class _Span:
    """The bytes from the first to the last entry of a tensor; ``axes`` are strides in bytes, and steps along each."""

    begin: int
    end: int
    index: int
    itemsize: int
    axes: tuple[tuple[int, int], ...]

    def arc(self, period: int) -> int:
        """Bytes from the first to the last of its entries on a circle on which memory is wound up."""
        return self.itemsize + sum(stride * steps for stride, steps in self.axes if stride % period)


def _clusters(tensors: Sequence[torch.Tensor]) -> Iterator[list[_Span]]:
    """Tensors whose spans meet, or meet the same ones, two at least."""
    spans = []
    for i, x in enumerate(tensors):
        size, begin = x.element_size(), x.data_ptr()
        axes = tuple((stride * size, n - 1) for stride, n in zip(x.stride(), x.shape, strict=True) if n > 1)
        spans.append((str(x.device), begin, _Span(begin, begin + extent(x.shape, x.stride()) * size, i, size, axes)))
    spans.sort(key=lambda span: span[:2])
    cluster: list[_Span] = []
    device, end = "", 0
    for name, begin, span in spans:
        if name != device or begin >= end:
            if len(cluster) > 1:
                yield cluster
            cluster, device, end = [], name, span.end
        cluster.append(span)
        end = max(end, span.end)
    if len(cluster) > 1:
        yield cluster


def _meeting(spans: Sequence[_Span]) -> Iterator[tuple[_Span, _Span]]:
    """Every two that may share memory, and others.

    Spans of interleaved views, as columns of a matrix, all meet. With memory wound up on a circle of a row's length
    each column keeps to an arc of its own: whichever line or circle is covered least tells most of them apart.
    """
    length = max(span.end for span in spans) - spans[0].begin
    strides = Counter(stride for span in spans for stride, _ in span.axes if stride).most_common(_PERIODS)
    covered = {stride: sum(min(1.0, span.arc(stride) / stride) for span in spans) for stride, _ in strides}
    covered[0] = sum((span.end - span.begin) / length for span in spans)
    period = min(covered, key=lambda stride: covered[stride])
    pieces = []
    for i, span in enumerate(spans):
        begin, end = span.begin, span.end
        if period:
            begin %= period
            end = begin + min(span.arc(period), period)
            if end > period:
                pieces.append((0, end - period, i))
                end = period
        pieces.append((begin, end, i))
    pieces.sort()
    entered: list[tuple[int, int, int]] = []
    for piece in pieces:
        entered = [other for other in entered if other[1] > piece[0]]
        yield from ((spans[other[2]], spans[piece[2]]) for other in entered if other[2] != piece[2])
        entered.append(piece)


class _Layout:
    """The address and strides of a tensor for NumPy's exact overlap test, which reads no memory."""

    def __init__(self, x: torch.Tensor) -> None:
        size = x.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (x.data_ptr(), False),
            "shape": tuple(x.shape),
            "strides": tuple(stride * size for stride in x.stride()),
        }
