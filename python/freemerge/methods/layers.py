"""What a tensor's name and shape tell about its layer, where nothing else is known of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence

SMALLEST_STACKED_SIDE = 16  # a 3-D weight with a shorter side is a convolution kernel, not a stack of matrices

_EMBEDDING = re.compile(r"embed|wte|wpe|(^|\.)shared\.weight$|relative_attention_bias")  # the last two are T5's


def is_embedding(name: str) -> bool:
    """Whether the rows of a matrix are looked up, and not multiplied."""
    return _EMBEDDING.search(name.lower()) is not None


def is_convolution(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a convolution kernel, [outputs, inputs, ...], and no matrix or stack of matrices."""
    if len(shape) == 3:
        return min(shape[1:]) < SMALLEST_STACKED_SIDE or "conv" in name.lower()
    return len(shape) > 3
