"""Do tensors hold NaN or infinity?"""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from .spec import MERGEABLE

_BLOCK = 1 << 22  # entries that are looked at together


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity."""
    if tensor.numel() == 0:
        return True
    for block in torch.split(tensor.reshape(-1), _BLOCK):
        values = block if block.dtype in MERGEABLE else block.float()
        # A NaN anywhere makes both NaN: one pass without a mask in memory, many times faster than isfinite().all().
        low, high = torch.aminmax(values)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            return False
    return True


def stays_finite(tensor: torch.Tensor, converted: torch.Tensor) -> bool:
    """Whether no entry of a tensor overflows in the dtype that it was converted to."""
    before, after = (t.isfinite() if t.itemsize > 1 else t.float().isfinite() for t in (tensor, converted))
    return torch.equal(before, after)


def check_finite(name: str, tensor: torch.Tensor, source: str) -> None:
    """Raise CheckpointError, naming source and tensor, if a float tensor holds a NaN or an infinity."""
    if tensor.is_floating_point() and not all_finite(tensor):
        # A mask is to be copied; weights that overflowed are not, as that would take the base's.
        values = tensor if tensor.dtype in MERGEABLE else tensor.float()
        mask = not bool(values.isnan().any() | values.isposinf().any())
        advice = " (a mask can be selected to 'copy')" if mask else ""
        raise CheckpointError(f"{source}: tensor {name!r} holds NaN or infinity{advice}")
