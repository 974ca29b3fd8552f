"""FREE-Merging's light experts: extracted from task vectors, stored compactly, switched on and off exactly."""

from .bank import ExpertBank
from .expert import Expert
from .extract import extract_experts, iter_experts
from .folder import SavedExpert, save_experts
from .routed import Routed, RoutedModel
from .router import PooledState, Router
from .values import ExpertTensor

__all__ = [
    "Expert",
    "ExpertBank",
    "ExpertTensor",
    "PooledState",
    "Routed",
    "RoutedModel",
    "Router",
    "SavedExpert",
    "extract_experts",
    "iter_experts",
    "save_experts",
]
