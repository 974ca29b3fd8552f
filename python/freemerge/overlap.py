"""Do tensors share memory? In-place work must not meet an element twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch


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
    spans = sorted((str(x.device), *_span(x), i) for i, x in enumerate(tensors))
    open_spans: list[tuple[str, int, int, int]] = []
    for span in spans:
        open_spans = [other for other in open_spans if other[0] == span[0] and other[2] > span[1]]
        for other in open_spans:
            if np.shares_memory(np.asarray(_Layout(tensors[other[3]])), np.asarray(_Layout(tensors[span[3]]))):
                yield min(other[3], span[3]), max(other[3], span[3])
        open_spans.append(span)


def _span(x: torch.Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + extent(x.shape, x.stride()) * x.element_size()


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
