"""FREE-Merging's light experts: extracted from task vectors, stored compactly, switched on and off exactly."""

from .bank import ExpertBank
from .expert import Expert
from .extract import extract_experts, iter_experts
from .tensor import ExpertTensor

__all__ = ["Expert", "ExpertBank", "ExpertTensor", "extract_experts", "iter_experts"]
