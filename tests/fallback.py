"""The torch backend as it is on a device without native kernels, on CPU tensors."""

from __future__ import annotations

import torch

from freemerge.backends.torch import TorchBackend
from freemerge.planner.costs import Traits


class Elsewhere(TorchBackend):
    def traits(self, device: torch.device) -> Traits:
        return super().traits(torch.device("cuda"))
